//! Redis: a server without persistence, a small client, and a client that blocks the server.

use std::{
    io::{BufRead as _, BufReader, Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use anyhow::{Context as _, Result, bail};

use crate::{ports, process::Process, program, temp::TempDir, wait};

/// Deadline for the start.
const START_DEADLINE: Duration = Duration::from_secs(30);
/// Response timeout, longer than any script here runs.
const RESPONSE_TIMEOUT: Duration = Duration::from_secs(30);

/// A running Redis that responds.
pub struct Redis {
    process: Process,
    port: u16,
    _temp: TempDir,
}

impl Redis {
    pub fn start() -> Result<Self> {
        Self::start_with(|_| ())
    }

    /// `change` may wrap or extend the command line, for example to pin it to a CPU.
    pub fn start_with(change: impl FnOnce(&mut Vec<String>)) -> Result<Self> {
        let program = program::need(&["redis-server"])?;
        let temp = TempDir::new("redis")?;
        let port = ports::free()?;
        let mut words = vec![program.display().to_string()];
        words.extend(["--port", &port.to_string(), "--bind", "127.0.0.1"].map(str::to_owned));
        words.extend(["--save", "", "--appendonly", "no", "--daemonize", "no"].map(str::to_owned));
        change(&mut words);
        let mut command = Command::new(&words[0]);
        command.args(&words[1..]).current_dir(temp.path());
        let process = Process::start("Redis", &mut command)?;
        wait::until("a response from Redis", START_DEADLINE, || {
            process.check_running()?;
            Ok(Client::connect(port)
                .and_then(|mut client| client.call(&["PING"]))
                .ok())
        })?;
        Ok(Self {
            process,
            port,
            _temp: temp,
        })
    }

    pub fn process(&self) -> &Process {
        &self.process
    }

    pub fn port(&self) -> u16 {
        self.port
    }

    pub fn address(&self) -> SocketAddr {
        ports::local(self.port)
    }

    pub fn client(&self) -> Result<Client> {
        Client::connect(self.port)
    }

    /// Blocks the server with a script of length `busy`, pauses for `gap`, and repeats until the result is dropped.
    ///
    /// Without a gap a call may wait for two scripts: Redis may read the next script together with the calls that waited for
    /// the last one, and run it first. A gap of 2 ms limits the wait to one.
    pub fn hog(&self, busy: Duration, gap: Duration) -> Result<Hog> {
        let mut client = self.client()?;
        let stop = Arc::new(AtomicBool::new(false));
        let rounds = Arc::new(AtomicU64::new(0));
        let (stopped, counted) = (stop.clone(), rounds.clone());
        let busy_ms = busy.as_millis().to_string();
        let thread = thread::Builder::new()
            .name("hog".to_owned())
            .spawn(move || {
                while !stopped.load(Ordering::Relaxed) {
                    client.call(&["EVAL", include_str!("redis/busy.lua"), "0", &busy_ms])?;
                    counted.fetch_add(1, Ordering::Relaxed);
                    thread::sleep(gap);
                }
                Ok(())
            })?;
        Ok(Hog {
            stop,
            rounds,
            thread: Some(thread),
        })
    }
}

/// A client that blocks Redis: all other calls wait until its script is done.
pub struct Hog {
    stop: Arc<AtomicBool>,
    rounds: Arc<AtomicU64>,
    thread: Option<JoinHandle<Result<()>>>,
}

impl Hog {
    /// Number of completed scripts.
    pub fn rounds(&self) -> u64 {
        self.rounds.load(Ordering::Relaxed)
    }

    /// Stops it; fails if a script failed.
    pub fn stop(mut self) -> Result<()> {
        self.finish()
    }

    fn finish(&mut self) -> Result<()> {
        self.stop.store(true, Ordering::Relaxed);
        match self.thread.take().map(JoinHandle::join) {
            Some(Ok(done)) => done.context("keep Redis busy"),
            Some(Err(_)) => bail!("the thread that keeps Redis busy panicked"),
            None => Ok(()),
        }
    }
}

impl Drop for Hog {
    fn drop(&mut self) {
        let _ = self.finish();
    }
}

/// A reply in the RESP2 protocol.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reply {
    Text(String),
    Number(i64),
    Nothing,
    Many(Vec<Self>),
}

/// One connection.
pub struct Client {
    stream: BufReader<TcpStream>,
}

impl Client {
    pub fn connect(port: u16) -> Result<Self> {
        let connect = || -> std::io::Result<TcpStream> {
            let stream = TcpStream::connect_timeout(&ports::local(port), RESPONSE_TIMEOUT)?;
            stream.set_read_timeout(Some(RESPONSE_TIMEOUT))?;
            stream.set_nodelay(true)?;
            Ok(stream)
        };
        let stream = connect().with_context(|| format!("connect to Redis on port {port}"))?;
        Ok(Self {
            stream: BufReader::new(stream),
        })
    }

    /// Sends one command and returns its reply.
    pub fn call(&mut self, words: &[&str]) -> Result<Reply> {
        let context = || format!("call Redis's {}", words.first().unwrap_or(&""));
        let mut request = format!("*{}\r\n", words.len());
        for word in words {
            request += &format!("${}\r\n{word}\r\n", word.len());
        }
        self.stream
            .get_mut()
            .write_all(request.as_bytes())
            .with_context(context)?;
        self.reply().with_context(context)
    }

    fn reply(&mut self) -> Result<Reply> {
        let mut line = String::new();
        self.stream.read_line(&mut line)?;
        let Some(line) = line.strip_suffix("\r\n") else {
            bail!("Redis closed the connection");
        };
        let (kind, rest) = line.split_at_checked(1).unwrap_or_default();
        Ok(match kind {
            "+" => Reply::Text(rest.to_owned()),
            "-" => bail!("Redis replied {rest:?}"),
            ":" => Reply::Number(rest.parse()?),
            "$" | "*" if rest == "-1" => Reply::Nothing,
            "$" => {
                let mut bytes = vec![0; rest.parse::<usize>()? + 2];
                self.stream.read_exact(&mut bytes)?;
                bytes.truncate(bytes.len() - 2);
                Reply::Text(String::from_utf8_lossy(&bytes).into_owned())
            }
            "*" => Reply::Many(
                (0..rest.parse::<usize>()?)
                    .map(|_| self.reply())
                    .collect::<Result<_>>()?,
            ),
            _ => bail!("not a RESP2 reply: {line:?}"),
        })
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;
    use crate::skip::skip;

    #[test]
    fn a_hog_delays_every_other_call() {
        if let Err(missing) = program::need(&["redis-server"]) {
            return skip("a_hog_delays_every_other_call", &missing.to_string());
        }
        let redis = Redis::start().unwrap();
        let mut client = redis.client().unwrap();
        assert_eq!(
            client.call(&["SET", "a", "b c"]).unwrap(),
            Reply::Text("OK".to_owned())
        );
        assert_eq!(
            client.call(&["GET", "a"]).unwrap(),
            Reply::Text("b c".to_owned())
        );
        assert_eq!(client.call(&["GET", "b"]).unwrap(), Reply::Nothing);
        assert!(
            client
                .call(&["NO SUCH"])
                .unwrap_err()
                .root_cause()
                .to_string()
                .contains("ERR unknown command")
        );

        let hog = redis
            .hog(Duration::from_millis(100), Duration::from_millis(2))
            .unwrap();
        wait::until("the first round", START_DEADLINE, || {
            Ok((hog.rounds() > 0).then_some(()))
        })
        .unwrap();
        // A reply arrives at the end of a script; a call 20 ms later waits for the end of the next one. Up to three of
        // ten calls may miss that, if this thread was held up.
        client.call(&["GET", "a"]).unwrap();
        let waits = [(); 10].map(|()| {
            thread::sleep(Duration::from_millis(20));
            let before = Instant::now();
            client.call(&["GET", "a"]).unwrap();
            before.elapsed()
        });
        let long = waits
            .iter()
            .filter(|waited| **waited > Duration::from_millis(40));
        assert!(long.count() >= 7, "{waits:?}");
        hog.stop().unwrap();
    }
}
