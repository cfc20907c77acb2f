//! The helper process: does what the agent itself can no longer do after it has dropped its privileges (`confinement`).
//!
//! It creates and removes files in the directory of pages, and runs the adapter process. It has no access to other processes and
//! loads no eBPF program. It accepts only the requests in `Request`, each in one packet on a socket that only the agent has,
//! and checks every name in them. An attacker who controls the agent can request nothing else. When the agent ends, so does the
//! helper.

mod adapter_process;
mod server;

use std::{
    fs::File,
    io::{self, IoSlice, IoSliceMut, Seek as _, Write as _},
    mem::MaybeUninit,
    os::{
        fd::{AsFd as _, BorrowedFd, OwnedFd},
        unix::process::CommandExt as _,
    },
    path::PathBuf,
    process::{Child, Stdio},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use anyhow::{Context as _, Result, anyhow, bail};
use rustix::{
    fs::{MemfdFlags, memfd_create},
    io::Errno,
    net::{
        AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
        SendAncillaryMessage, SendFlags, SocketFlags, SocketType, recvmsg, sendmsg, socketpair,
        sockopt::{Timeout, set_socket_timeout},
    },
};
use serde::{Deserialize, Serialize, de::DeserializeOwned};

use super::{Failure, exit_code::Outcome};
use crate::{
    sample::Notice,
    signal::{
        directory::Directory,
        files::{Files, StateFile},
    },
};

/// Longest packet, bytes. The longest part of a request is a path (4,096), which grows when JSON escapes it.
const MAX_PACKET: usize = 32 * 1024;
/// How long a request may take. A file system that is this slow would hold up the agent without a helper, too.
const TIMEOUT: Duration = Duration::from_secs(5);

/// What the agent asks for. Some requests come with a descriptor.
#[derive(Debug, Serialize, Deserialize)]
enum Request {
    /// Work in this directory. Descriptor: the directory.
    UseDirectory {
        path: PathBuf,
        is_below_shared: bool,
    },
    /// See [`Files`]. The reply has the descriptor of the page.
    OpenPage(String),
    RemovePage(String),
    RemoveDirectory(String),
    /// Descriptor: a file with the contents.
    Save(StateFile),
    /// Run an adapter process with this configuration, in place of the running one. Descriptor: a file with its text.
    ServeAdapters,
    /// End the adapter process.
    ServeNoAdapters,
}

/// The reply: done, or why not.
type Reply = Result<(), String>;

/// The agent's end. Clones share the same process.
#[derive(Clone)]
pub(super) struct Helper(Arc<Shared>);

struct Shared {
    /// Locked from a request to its reply.
    requests: Mutex<OwnedFd>,
    notices: OwnedFd,
    is_gone: AtomicBool,
    /// Never waited for: it ends after the agent.
    _child: Child,
}

impl Helper {
    /// Starts the process, with the capabilities that this one holds.
    pub(super) fn start() -> Outcome<Self> {
        Self::try_start()
            .context("cannot start the helper process")
            .map_err(Failure::bug)
    }

    fn try_start() -> Result<Self> {
        let pair = || {
            let flags = SocketFlags::CLOEXEC;
            socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)
        };
        let (requests, stdin) = pair()?;
        let (notices, stdout) = pair()?;
        for timeout in [Timeout::Recv, Timeout::Send] {
            set_socket_timeout(&requests, timeout, Some(TIMEOUT))?;
        }
        let child = adapter_process::own_program()
            .arg("helper")
            .stdin(stdin)
            .stdout(Stdio::from(stdout))
            // Ctrl-C in our terminal does not reach it.
            .process_group(0)
            .spawn()?;
        Ok(Self(Arc::new(Shared {
            requests: Mutex::new(requests),
            notices,
            is_gone: AtomicBool::new(false),
            _child: child,
        })))
    }

    /// Whether the process has ended, as of the last request or [`Helper::notices`].
    pub(super) fn is_gone(&self) -> bool {
        self.0.is_gone.load(Ordering::Relaxed)
    }

    fn set_gone(&self) {
        self.0.is_gone.store(true, Ordering::Relaxed);
    }

    /// From now on, it works in this directory.
    pub(super) fn use_directory(&self, directory: &Directory) -> Result<()> {
        let request = Request::UseDirectory {
            path: directory.path.clone(),
            is_below_shared: directory.is_below_shared(),
        };
        self.ask(&request, Some(directory.fd.as_fd())).map(drop)
    }

    /// Serves the adapters of this configuration, instead of any former ones.
    pub(super) fn serve_adapters(&self, text: &str) -> Result<()> {
        let text = in_memory(text.as_bytes())?;
        self.ask(&Request::ServeAdapters, Some(text.as_fd()))
            .map(drop)
    }

    pub(super) fn serve_no_adapters(&self) -> Result<()> {
        self.ask(&Request::ServeNoAdapters, None).map(drop)
    }

    /// The notices about the adapter process since the last call. Does not wait.
    pub(super) fn notices(&self) -> Vec<Notice> {
        let mut notices = Vec::new();
        loop {
            match receive::<(String, String)>(&self.0.notices, RecvFlags::DONTWAIT) {
                Ok(Some(((code, text), _))) => notices.push(Notice { code, text }),
                Ok(None) => {
                    self.set_gone();
                    break;
                }
                // Nothing more now.
                Err(_) => break,
            }
        }
        notices
    }

    fn ask(
        &self,
        request: &Request,
        descriptor: Option<BorrowedFd<'_>>,
    ) -> Result<Option<OwnedFd>> {
        let socket: MutexGuard<'_, OwnedFd> = self
            .0
            .requests
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if self.is_gone() {
            bail!("the helper process has ended");
        }
        let replied = send(&socket, request, descriptor, SendFlags::NOSIGNAL)
            .and_then(|()| receive::<Reply>(&socket, RecvFlags::empty()));
        match replied {
            Ok(Some((Ok(()), descriptor))) => Ok(descriptor),
            Ok(Some((Err(why), _))) => Err(anyhow!(why)),
            Ok(None) => {
                self.set_gone();
                bail!("the helper process has ended")
            }
            // After a timeout, replies would be taken for those to later requests.
            Err(error) => {
                self.set_gone();
                Err(error).context("no reply from the helper process")
            }
        }
    }
}

impl Files for Helper {
    fn open_page(&self, name: &str) -> Result<OwnedFd> {
        let page = self.ask(&Request::OpenPage(name.to_owned()), None)?;
        page.context("the helper process has sent no page")
    }

    fn remove_page(&self, name: &str) -> Result<()> {
        self.ask(&Request::RemovePage(name.to_owned()), None)
            .map(drop)
    }

    fn remove_directory(&self, name: &str) -> Result<()> {
        self.ask(&Request::RemoveDirectory(name.to_owned()), None)
            .map(drop)
    }

    fn save(&self, file: StateFile, contents: &[u8]) -> Result<()> {
        let contents = in_memory(contents)?;
        self.ask(&Request::Save(file), Some(contents.as_fd()))
            .map(drop)
    }
}

/// `tailback helper`: serves the agent that has started it.
pub(super) fn run() -> Outcome<()> {
    server::run().map_err(Failure::bug)
}

fn send(
    socket: &OwnedFd,
    message: &impl Serialize,
    descriptor: Option<BorrowedFd<'_>>,
    flags: SendFlags,
) -> Result<()> {
    let text = serde_json::to_vec(message)?;
    if text.len() > MAX_PACKET {
        bail!("a message of {} bytes is too long", text.len());
    }
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    let descriptors: Vec<BorrowedFd<'_>> = descriptor.into_iter().collect();
    if !descriptors.is_empty() {
        ancillary.push(SendAncillaryMessage::ScmRights(&descriptors));
    }
    sendmsg(socket, &[IoSlice::new(&text)], &mut ancillary, flags)?;
    Ok(())
}

/// One message, and the descriptor that came with it. `None`: the other process has ended.
fn receive<T: DeserializeOwned>(
    socket: &OwnedFd,
    flags: RecvFlags,
) -> Result<Option<(T, Option<OwnedFd>)>> {
    let mut text = vec![0; MAX_PACKET];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let flags = flags | RecvFlags::CMSG_CLOEXEC;
    let received = loop {
        match recvmsg(
            socket,
            &mut [IoSliceMut::new(&mut text)],
            &mut ancillary,
            flags,
        ) {
            Err(Errno::INTR) => {}
            received => break received?,
        }
    };
    if received.bytes == 0 {
        return Ok(None);
    }
    let descriptors = ancillary.drain().filter_map(|message| match message {
        RecvAncillaryMessage::ScmRights(descriptors) => Some(descriptors),
        _ => None,
    });
    let descriptor = descriptors.flatten().next();
    let message = serde_json::from_slice(&text[..received.bytes])?;
    Ok(Some((message, descriptor)))
}

/// A file in memory with these contents. A pipe would block on a process that does not read.
fn in_memory(contents: &[u8]) -> io::Result<File> {
    let create = |flags| memfd_create("tailback", MemfdFlags::CLOEXEC | flags);
    let file = match create(MemfdFlags::NOEXEC_SEAL) {
        // Before Linux 6.3.
        Err(Errno::INVAL) => create(MemfdFlags::empty()),
        // With `vm.memfd_noexec = 2`, the kernel creates no other.
        file => file,
    };
    let mut file = File::from(file?);
    file.write_all(contents)?;
    file.rewind()?;
    Ok(file)
}
