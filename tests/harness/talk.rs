//! A server and a client of HTTP that log their own times: what is in flight, and what is outstanding, by their clocks.

use std::{net::SocketAddr, process::Command, time::Duration};

use anyhow::{Context as _, Result};

use crate::{
    process::{End, Process},
    program,
    temp::TempDir,
};

const START: Duration = Duration::from_secs(10);

/// How the two talk; the words of `talk.py`.
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

/// A certificate of its own, and its key.
pub struct Certificate {
    folder: TempDir,
}

impl Certificate {
    pub fn new() -> Result<Self> {
        let folder = TempDir::new("certificate")?;
        let mut command = Command::new(program::need(&["openssl"])?);
        command.current_dir(folder.path()).args([
            "req",
            "-x509",
            "-newkey",
            "rsa:2048",
            "-nodes",
            "-days",
            "1",
            "-subj",
            "/CN=localhost",
            "-keyout",
            "key.pem",
            "-out",
            "cert.pem",
        ]);
        let end = Process::start("openssl", &mut command)?.wait_end(START)?;
        anyhow::ensure!(end == End::Code(0), "openssl ended with {end:?}");
        Ok(Self { folder })
    }

    fn file(&self, name: &str) -> String {
        self.folder.path().join(name).display().to_string()
    }
}

/// From the first byte of a request to the first of its answer, ns since 1970.
#[derive(Clone, Copy, Debug)]
pub struct Span {
    pub began_ns: u64,
    pub answered_ns: u64,
    /// Sent before the answer to an earlier one.
    pub hidden: bool,
}

/// One of the two, running.
pub struct Talk {
    process: Process,
    _folder: TempDir,
}

impl Talk {
    /// A server, and its address. It works on each request for `work` on average.
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
        let line = talk.process.wait_line("listening ", START)?;
        let address = line.text.trim_start_matches("listening ");
        let address = address
            .parse()
            .with_context(|| format!("read {address:?}"))?;
        Ok((talk, address))
    }

    /// A closed loop on so many connections, which pauses for `think` on average.
    pub fn load(
        mode: Mode,
        to: SocketAddr,
        connections: u32,
        think: Duration,
        lasts: Duration,
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
            lasts.as_secs().to_string(),
        ]);
        args.extend(tls.map(|it| it.file("cert.pem")));
        Self::start(&args)
    }

    fn start(args: &[String]) -> Result<Self> {
        let folder = TempDir::new("talk")?;
        let script = folder.write("talk.py", include_str!("talk/talk.py"))?;
        let mut command = Command::new(program::need(&["python3"])?);
        let process = Process::start("talk.py", command.arg(script).args(args))?;
        Ok(Self {
            process,
            _folder: folder,
        })
    }

    pub fn pid(&self) -> u32 {
        self.process.pid()
    }

    /// Until a load has ended by itself.
    pub fn wait_done(&self, deadline: Duration) -> Result<()> {
        self.process.wait_line("done", deadline).map(drop)
    }

    /// All that was answered so far.
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
                answered_ns: words.next()?.parse().ok()?,
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
