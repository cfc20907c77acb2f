//! memcached: a service with many worker threads, and a load that keeps all of them busy.

use std::{
    convert::Infallible,
    io::{BufRead as _, BufReader, Write as _},
    net::{SocketAddr, TcpStream},
    process::Command,
    time::Duration,
};

use anyhow::{Context as _, Result, bail};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    task::JoinSet,
};

use crate::{ports, process::Process, program, wait};

/// Deadline for the start.
const START_DEADLINE: Duration = Duration::from_secs(30);
/// Timeout of each response.
const RESPONSE_TIMEOUT: Duration = Duration::from_secs(30);
const KEY: &str = "tailback";
/// Size of the value that the load reads.
const VALUE_BYTES: usize = 100;

/// A running memcached that responds.
pub struct Memcached {
    process: Process,
    address: SocketAddr,
}

impl Memcached {
    /// Starts it with this many worker threads. `change` may wrap or extend the command line, for example to pin it to a CPU.
    pub fn start_with(threads: usize, change: impl FnOnce(&mut Vec<String>)) -> Result<Self> {
        let program = program::need(&["memcached"])?;
        let port = ports::free()?;
        let mut words = vec![program.display().to_string()];
        // It refuses to run as root without an explicit user.
        words.extend(["-u", "root", "-U", "0", "-l", "127.0.0.1"].map(str::to_owned));
        words.extend(["-p", &port.to_string(), "-t", &threads.to_string()].map(str::to_owned));
        change(&mut words);
        let mut command = Command::new(&words[0]);
        let process = Process::start("memcached", command.args(&words[1..]))?;
        let address = ports::local(port);
        wait::until("a response from memcached", START_DEADLINE, || {
            process.check_running()?;
            Ok(Client::connect(address)
                .and_then(|mut client| client.stat("threads"))
                .ok())
        })?;
        let memcached = Self { process, address };
        let mut client = memcached.client()?;
        client.set(KEY, &"v".repeat(VALUE_BYTES))?;
        Ok(memcached)
    }

    pub fn process(&self) -> &Process {
        &self.process
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }

    pub fn client(&self) -> Result<Client> {
        Client::connect(self.address)
    }
}

/// One connection, using memcached's text protocol.
pub struct Client {
    stream: BufReader<TcpStream>,
}

impl Client {
    fn connect(address: SocketAddr) -> Result<Self> {
        let connect = || -> std::io::Result<TcpStream> {
            let stream = TcpStream::connect_timeout(&address, RESPONSE_TIMEOUT)?;
            stream.set_read_timeout(Some(RESPONSE_TIMEOUT))?;
            stream.set_nodelay(true)?;
            Ok(stream)
        };
        let stream = connect().with_context(|| format!("connect to memcached at {address}"))?;
        Ok(Self {
            stream: BufReader::new(stream),
        })
    }

    /// Number of get commands, from its `cmd_get` counter.
    pub fn gets(&mut self) -> Result<u64> {
        self.stat("cmd_get")
    }

    fn stat(&mut self, name: &str) -> Result<u64> {
        self.send("stats\r\n")?;
        let mut found = None;
        loop {
            let line = self.line()?;
            if line == "END" {
                return found.with_context(|| format!("memcached's stats have no {name}"));
            }
            let Some(rest) = line.strip_prefix("STAT ") else {
                bail!("memcached responded {line:?} instead of a stats line");
            };
            if let Some((key, value)) = rest.split_once(' ')
                && key == name
            {
                let number = value.parse();
                found = Some(number.with_context(|| format!("read memcached's {name}"))?);
            }
        }
    }

    fn set(&mut self, key: &str, value: &str) -> Result<()> {
        self.send(&format!("set {key} 0 0 {}\r\n{value}\r\n", value.len()))?;
        match self.line()?.as_str() {
            "STORED" => Ok(()),
            other => bail!("memcached responded {other:?} instead of STORED"),
        }
    }

    fn send(&mut self, text: &str) -> Result<()> {
        let stream = self.stream.get_mut();
        stream
            .write_all(text.as_bytes())
            .context("write to memcached")
    }

    fn line(&mut self) -> Result<String> {
        let mut line = String::new();
        let read = self.stream.read_line(&mut line);
        read.context("read memcached's response")?;
        match line.strip_suffix("\r\n") {
            Some(line) => Ok(line.to_owned()),
            None => bail!("memcached closed the connection"),
        }
    }
}

/// Reads one value in a closed loop on each of `connections` connections, from one thread, until one of them fails.
///
/// The closed loop measures throughput, not queueing. memcached assigns connections to its threads round-robin, so a
/// multiple of the thread count loads all threads equally.
pub fn load(address: SocketAddr, connections: usize) -> Result<Infallible> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("start the load's runtime")?;
    runtime.block_on(async {
        let mut clients = JoinSet::new();
        for _ in 0..connections {
            clients.spawn(read_forever(address));
        }
        match clients.join_next().await {
            Some(Ok(ended)) => ended,
            Some(Err(panicked)) => Err(panicked).context("a connection of the load"),
            None => bail!("the load has no connections"),
        }
    })
}

async fn read_forever(address: SocketAddr) -> Result<Infallible> {
    let mut stream = tokio::net::TcpStream::connect(address)
        .await
        .with_context(|| format!("connect to memcached at {address}"))?;
    stream.set_nodelay(true)?;
    let request = format!("get {KEY}\r\n");
    // All responses are identical, so their length delimits them.
    let value = "v".repeat(VALUE_BYTES);
    let wanted = format!("VALUE {KEY} 0 {VALUE_BYTES}\r\n{value}\r\nEND\r\n");
    let mut response = vec![0; wanted.len()];
    loop {
        stream.write_all(request.as_bytes()).await?;
        let read = stream.read_exact(&mut response).await;
        read.context("read memcached's response")?;
        if response != wanted.as_bytes() {
            let response = String::from_utf8_lossy(&response);
            bail!("memcached responded {response:?} instead of {wanted:?}");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;
    use crate::skip::skip;

    #[test]
    fn a_load_uses_every_thread_and_ends_with_the_server() {
        if let Err(missing) = program::need(&["memcached"]) {
            return skip(
                "a_load_uses_every_thread_and_ends_with_the_server",
                &missing.to_string(),
            );
        }
        let memcached = Memcached::start_with(3, |_| ()).unwrap();
        let mut client = memcached.client().unwrap();
        assert_eq!(client.stat("threads").unwrap(), 3);
        let address = memcached.address();
        let load = thread::spawn(move || load(address, 6));
        wait::until("a thousand responses", START_DEADLINE, || {
            assert!(!load.is_finished(), "the load has ended");
            Ok((client.gets()? > 1000).then_some(()))
        })
        .unwrap();
        drop(memcached);
        load.join().unwrap().unwrap_err();
    }
}
