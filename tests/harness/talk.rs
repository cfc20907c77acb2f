//! An HTTP server and client that log the times of their requests: the truth for requests in flight and calls outstanding.

use std::{net::SocketAddr, process::Command, time::Duration};

use anyhow::{Context as _, Result};

use crate::{certificate::certify, process::Process, program, temp::TempDir};

/// Deadline for the start.
const START_DEADLINE: Duration = Duration::from_secs(30);

/// Traffic pattern; see `talk.py`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    Plain,
    Large,
    Streamed,
    Pipelined,
}

impl Mode {
    fn word(self) -> &'static str {
        match self {
            Self::Plain => "plain",
            Self::Large => "large",
            Self::Streamed => "streamed",
            Self::Pipelined => "pipelined",
        }
    }
}

/// A self-signed certificate and its key.
pub struct Certificate {
    directory: TempDir,
}

impl Certificate {
    pub fn new() -> Result<Self> {
        let directory = TempDir::new("certificate")?;
        certify(directory.path(), 2_048)?;
        Ok(Self { directory })
    }

    fn file(&self, name: &str) -> String {
        self.directory.path().join(name).display().to_string()
    }
}

/// From the first byte of a request to the first byte of its response, ns since 1970.
#[derive(Clone, Copy, Debug)]
pub struct Span {
    pub began_ns: u64,
    pub responded_ns: u64,
    /// Sent before the response to an earlier request (pipelined).
    pub hidden: bool,
}

/// A running server or client.
pub struct Talk {
    process: Process,
    _directory: TempDir,
}

impl Talk {
    /// Starts a server whose mean service time is `work`. Returns its address too.
    pub fn serve(
        mode: Mode,
        work: Duration,
        tls: Option<&Certificate>,
    ) -> Result<(Self, SocketAddr)> {
        let mut args = vec!["serve".to_owned(), mode.word().to_owned(), ms(work)];
        args.extend(
            tls.iter()
                .flat_map(|it| [it.file("cert.pem"), it.file("key.pem")]),
        );
        let talk = Self::start(&args)?;
        let line = talk.process.wait_line("listening ", START_DEADLINE)?;
        let address = line.text.trim_start_matches("listening ");
        let address = address
            .parse()
            .with_context(|| format!("parse {address:?}"))?;
        Ok((talk, address))
    }

    /// Starts a client: a closed loop on each of `connections` connections, with mean think time `think`.
    pub fn load(
        mode: Mode,
        to: SocketAddr,
        connections: u32,
        think: Duration,
        duration: Duration,
        tls: Option<&Certificate>,
    ) -> Result<Self> {
        let mut args = vec![
            "load".to_owned(),
            mode.word().to_owned(),
            to.port().to_string(),
        ];
        args.extend([
            connections.to_string(),
            ms(think),
            duration.as_secs().to_string(),
        ]);
        args.extend(tls.map(|it| it.file("cert.pem")));
        Self::start(&args)
    }

    fn start(args: &[String]) -> Result<Self> {
        let directory = TempDir::new("talk")?;
        let script = directory.write("talk.py", include_str!("talk/talk.py"))?;
        let mut command = Command::new(program::need(&["python3"])?);
        let process = Process::start("talk.py", command.arg(script).args(args))?;
        Ok(Self {
            process,
            _directory: directory,
        })
    }

    pub fn pid(&self) -> u32 {
        self.process.pid()
    }

    /// Waits until the client has finished.
    pub fn wait_done(&self, deadline: Duration) -> Result<()> {
        self.process.wait_line("done", deadline).map(drop)
    }

    /// Requests with a response so far.
    pub fn spans(&self) -> Vec<Span> {
        let read = |text: &str| {
            let mut words = text.split(' ');
            let hidden = match words.next()? {
                "span" => false,
                "hidden" => true,
                _ => return None,
            };
            Some(Span {
                began_ns: words.next()?.parse().ok()?,
                responded_ns: words.next()?.parse().ok()?,
                hidden,
            })
        };
        let lines = self.process.lines().all();
        lines.iter().filter_map(|line| read(&line.text)).collect()
    }
}

fn ms(time: Duration) -> String {
    (time.as_secs_f64() * 1e3).to_string()
}
