//! The helper process's own end: reads requests, and supervises the adapter process between them.

use std::{
    fs::File,
    io::Read as _,
    os::fd::{AsFd as _, OwnedFd},
};

use anyhow::{Context as _, Result, bail};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::Errno,
    net::{RecvFlags, SendFlags},
    thread::{CapabilitySet, CapabilitySets, capabilities, set_capabilities, set_no_new_privs},
};

use super::{Reply, Request, adapter_process::AdapterProcess, receive, send};
use crate::{
    config::file::MAX_BYTES as MAX_CONFIG_BYTES,
    signal::{
        directory::Directory,
        files::{Files as _, OwnFiles},
    },
};

/// How often the adapter process is checked, ns.
const CHECK_INTERVAL_NS: i64 = 100_000_000;
/// What the adapter process needs to become nobody, to listen on a low port and to write Envoy's runtime layer; and what the
/// helper needs to kill it.
const KEPT: CapabilitySet = CapabilitySet::SETUID
    .union(CapabilitySet::NET_BIND_SERVICE)
    .union(CapabilitySet::DAC_OVERRIDE)
    .union(CapabilitySet::KILL);

/// Serves requests until the agent has ended.
pub(super) fn run() -> Result<()> {
    outlive_signals();
    drop_privileges()?;
    let requests = std::io::stdin().as_fd().try_clone_to_owned()?;
    let notices = std::io::stdout().as_fd().try_clone_to_owned()?;
    let mut server = Server::default();
    loop {
        if is_readable(&requests)? {
            let Some((request, descriptor)) = receive(&requests, RecvFlags::empty())? else {
                return Ok(());
            };
            let done = server.serve(&request, descriptor);
            let (reply, page): (Reply, _) = match done {
                Ok(page) => (Ok(()), page),
                Err(error) => (Err(format!("{error:#}")), None),
            };
            let page = page.as_ref().map(OwnedFd::as_fd);
            send(&requests, &reply, page, SendFlags::NOSIGNAL)?;
        }
        if let (Some(process), Some(directory)) = (&mut server.adapters, &server.directory)
            && let Some(notice) = process.supervise(directory)
        {
            let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
            // An error means that the agent does not read; it reports a hung adapter process again.
            let _ = send(&notices, &(notice.code, notice.text), None, flags);
        }
    }
}

/// The agent decides when it ends. A service manager that stops both sends SIGTERM to both, and the agent needs its helper for a
/// moment longer.
fn outlive_signals() {
    // Handled, not ignored: the adapter process would inherit that.
    extern "C" fn do_nothing(_signal: libc::c_int) {}
    let handler = do_nothing as extern "C" fn(libc::c_int);
    for signal in [libc::SIGTERM, libc::SIGINT, libc::SIGHUP] {
        // SAFETY: the handler does nothing.
        unsafe { libc::signal(signal, handler as *const () as libc::sighandler_t) };
    }
}

/// Waits for a request, until the adapter process is to be checked.
fn is_readable(requests: &OwnedFd) -> Result<bool> {
    let timeout = Timespec {
        tv_sec: 0,
        tv_nsec: CHECK_INTERVAL_NS,
    };
    let mut polled = [PollFd::new(requests, PollFlags::IN)];
    match poll(&mut polled, Some(&timeout)) {
        Ok(ready) => Ok(ready > 0),
        Err(Errno::INTR) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

/// Keeps only what the adapter process may use.
fn drop_privileges() -> Result<()> {
    let held = capabilities(None).context("cannot read the capabilities")?;
    let kept = held.permitted & KEPT;
    let sets = CapabilitySets {
        // Of a root that writes in its own directory no other is used here.
        effective: kept & CapabilitySet::KILL,
        permitted: kept,
        inheritable: held.inheritable & kept,
    };
    set_capabilities(None, sets).context("cannot drop capabilities")?;
    set_no_new_privs(true).context("cannot set no_new_privs")
}

#[derive(Default)]
struct Server {
    directory: Option<Directory>,
    files: Option<OwnFiles>,
    adapters: Option<AdapterProcess>,
}

impl Server {
    /// Does what is asked. The descriptor of the reply is that of a page.
    fn serve(&mut self, request: &Request, descriptor: Option<OwnedFd>) -> Result<Option<OwnedFd>> {
        match request {
            Request::UseDirectory {
                path,
                is_below_shared,
            } => {
                if self.directory.is_some() {
                    bail!("the directory is set only once");
                }
                let fd = descriptor.context("no directory was sent")?;
                self.files = Some(OwnFiles(fd.try_clone()?));
                self.directory = Some(Directory::received(fd, path.clone(), *is_below_shared)?);
            }
            Request::OpenPage(name) => return self.files()?.open_page(name).map(Some),
            Request::RemovePage(name) => self.files()?.remove_page(name)?,
            Request::RemoveDirectory(name) => self.files()?.remove_directory(name)?,
            Request::Save(file) => {
                let contents = read(descriptor, file.max_bytes())?;
                self.files()?.save(*file, &contents)?;
            }
            Request::ServeAdapters => {
                let text = String::from_utf8(read(descriptor, MAX_CONFIG_BYTES)?)?;
                match &mut self.adapters {
                    Some(process) => process.replace(&text),
                    None => self.adapters = Some(AdapterProcess::new(&text)),
                }
            }
            Request::ServeNoAdapters => {
                if let Some(process) = &mut self.adapters {
                    process.end();
                }
            }
        }
        Ok(None)
    }

    fn files(&self) -> Result<&OwnFiles> {
        self.files.as_ref().context("no directory is set")
    }
}

fn read(descriptor: Option<OwnedFd>, max_bytes: u64) -> Result<Vec<u8>> {
    let file = File::from(descriptor.context("no file was sent")?);
    let mut contents = Vec::new();
    // One byte more shows that there is more.
    file.take(max_bytes + 1).read_to_end(&mut contents)?;
    if contents.len() as u64 > max_bytes {
        bail!("a file of more than {max_bytes} bytes was sent");
    }
    Ok(contents)
}
