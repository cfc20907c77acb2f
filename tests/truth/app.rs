//! Queues that services report themselves, compared with the services' own tools. The service is asked before and after the agent:
//! the agent's number must lie between both answers, within 5%.

use std::{
    fs,
    io::{BufRead as _, BufReader, Read as _, Write as _},
    net::{SocketAddr, TcpListener, TcpStream},
    os::unix::net::UnixStream,
    path::Path,
    process::{Command, Stdio},
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use tailback_tests::{
    envoy, http, needs,
    pgbouncer::PgBouncer,
    ports,
    postgres::{Postgres, sql_at},
    process::Process,
    program, python,
    redis::{Redis, Reply},
    sample::{Sample, number},
    skip::skip,
    temp::TempDir,
    wait,
};

use crate::alone;

/// Deadline of each wait for a server or a state.
const DEADLINE: Duration = Duration::from_secs(60);
/// The goal for depths and limits.
const TOLERANCE: f64 = 0.05;
/// What a client waits for a response, longer than any test runs.
const PATIENCE: Duration = Duration::from_secs(120);

/// One number of a queue, as the agent reports it, and as the service does before and after.
struct Compared {
    what: String,
    agent: u64,
    service: (u64, u64),
}

impl Compared {
    fn is_right(&self) -> bool {
        let (before, after) = (self.service.0 as f64, self.service.1 as f64);
        let agent = self.agent as f64;
        (before.min(after) * (1.0 - TOLERANCE)..=before.max(after) * (1.0 + TOLERANCE))
            .contains(&agent)
    }
}

/// Samples `pid` until its queue `name` has all these measures right: `KEY`, or `extra KEY`. `ask` returns what the service says, in
/// the same order. The agent gets a few attempts, because the queue may be new to it.
fn compare(
    pid: u32,
    config: Option<&Path>,
    name: &str,
    keys: &[&str],
    mut ask: impl FnMut() -> Result<Vec<u64>>,
) -> Result<()> {
    wait::unless_paused(|| {
        wait::until_ok(
            "the numbers of the service",
            Duration::from_secs(20),
            || {
                let before = ask()?;
                let pid = pid.to_string();
                let mut args = vec!["--pid", &pid];
                let path = config.map(|config| config.display().to_string());
                if let Some(path) = &path {
                    args.extend(["--config", path]);
                }
                let sample = Sample::of(&args)?;
                let queue = sample.queue("app", name)?;
                let after = ask()?;
                ensure!(before.len() == keys.len(), "{} numbers", before.len());
                let mut wrong = Vec::new();
                for (at, key) in keys.iter().enumerate() {
                    let compared = Compared {
                        what: format!("{name}, {key}"),
                        agent: measure(queue, key)?,
                        service: (before[at], after[at]),
                    };
                    println!(
                        "{}: agent {}, service {:?}",
                        compared.what, compared.agent, compared.service
                    );
                    if !compared.is_right() {
                        wrong.push(compared.what);
                    }
                }
                ensure!(wrong.is_empty(), "wrong: {wrong:?}");
                Ok(())
            },
        )
    })
}

/// Compares the rates that the agent reports of a queue with those of `step`, which is called at fixed intervals, with the number of
/// the step, however long its work takes.
fn compare_rates(
    (pid, config, name): (u32, Option<&Path>, &str),
    interval: Duration,
    expected: (f64, f64),
    mut step: impl FnMut(u64) -> Result<()> + Send,
) -> Result<()> {
    /// Three answers, at 5 s each.
    const SAMPLED: &str = "12s";
    wait::unless_paused(|| {
        let is_over = AtomicBool::new(false);
        let sample = thread::scope(|scope| {
            let load = scope.spawn(|| -> Result<()> {
                let began = Instant::now();
                for number in 0.. {
                    if is_over.load(Ordering::Relaxed) {
                        break;
                    }
                    step(number)?;
                    let due = interval * u32::try_from(number + 1)?;
                    thread::sleep(due.saturating_sub(began.elapsed()));
                }
                Ok(())
            });
            let pid = pid.to_string();
            let mut args = vec!["--pid", &pid, "--duration", SAMPLED];
            let path = config.map(|config| config.display().to_string());
            if let Some(path) = &path {
                args.extend(["--config", path]);
            }
            let sample = Sample::of(&args);
            is_over.store(true, Ordering::Relaxed);
            load.join().ok().context("the load panicked")??;
            sample
        })?;
        let queues = sample.queues("app").filter(|queue| queue["name"] == *name);
        let queue = queues.last().with_context(|| format!("no queue {name}"))?;
        let rate = |key: &str| {
            let rate = queue[key].as_f64();
            rate.with_context(|| format!("no {key} in {queue}"))
        };
        let rates = (rate("arrivals_per_s")?, rate("departures_per_s")?);
        println!("{name}: agent {rates:?} per second, load {expected:?}");
        let is_right = |rate: f64, expected: f64| (rate - expected).abs() <= expected * TOLERANCE;
        ensure!(
            is_right(rates.0, expected.0) && is_right(rates.1, expected.1),
            "{name}: agent {rates:?} per second, load {expected:?}"
        );
        Ok(())
    })
}

fn measure(queue: &Value, key: &str) -> Result<u64> {
    let value = queue[key].as_f64();
    value
        .map(|value| value.round() as u64)
        .with_context(|| format!("no {key} in {queue}"))
}

/// A server that accepts connections and never answers. It holds them until the process ends.
fn silent_server() -> Result<SocketAddr> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let address = listener.local_addr()?;
    thread::spawn(move || {
        let mut held = Vec::new();
        held.extend(listener.incoming().flatten());
    });
    Ok(address)
}

/// Clients that send a request each and wait.
fn waiting_clients(to: SocketAddr, count: usize) -> Result<Vec<TcpStream>> {
    (0..count)
        .map(|_| {
            let mut stream = TcpStream::connect(to)?;
            stream.write_all(b"GET / HTTP/1.1\r\nHost: test\r\n\r\n")?;
            Ok(stream)
        })
        .collect()
}

#[test]
fn a_backlog_in_haproxy_is_that_of_its_statistics() -> Result<()> {
    const TEST: &str = "a_backlog_in_haproxy_is_that_of_its_statistics";
    if !needs::met(TEST, &["haproxy"]) {
        return Ok(());
    }
    let _alone = alone();
    let temp = TempDir::new("app-haproxy")?;
    let socket = temp.path().join("admin.sock");
    let port = ports::free()?;
    let server = silent_server()?;
    let config = temp.write(
        "haproxy.cfg",
        &format!(
            "global\n stats socket {} mode 600 level admin\n\
             defaults\n mode http\n timeout connect 5s\n timeout client 120s\n timeout server 120s\n timeout queue 120s\n\
             frontend front\n bind 127.0.0.1:{port}\n default_backend back\n\
             backend back\n server one {server} maxconn 3 maxqueue 40\n",
            socket.display()
        ),
    )?;
    let mut command = Command::new(program::need(&["haproxy"])?);
    let haproxy = Process::start("HAProxy", command.arg("-db").arg("-f").arg(config))?;
    wait::until_ok("HAProxy to listen", DEADLINE, || {
        UnixStream::connect(&socket)?;
        Ok(TcpStream::connect(ports::local(port))?)
    })?;
    let _clients = waiting_clients(ports::local(port), 20)?;
    let statistic = |row: &str, name: &str| -> Result<u64> {
        let mut stream = UnixStream::connect(&socket)?;
        stream.write_all(b"show stat\n")?;
        let mut text = String::new();
        stream.read_to_string(&mut text)?;
        let mut lines = text.lines();
        let head = lines.next().context("no head")?.trim_start_matches("# ");
        let column = head.split(',').position(|column| column == name);
        let line = lines.find(|line| line.starts_with(row)).context("no row")?;
        let field = line.split(',').nth(column.context("no column")?);
        Ok(field.context("no field")?.parse()?)
    };
    wait::until("17 requests to wait", DEADLINE, || {
        Ok((statistic("back,BACKEND,", "qcur")? == 17).then_some(()))
    })?;
    let keys = ["depth", "serving", "slots", "consumers"];
    compare(haproxy.pid(), None, "haproxy: backend back", &keys, || {
        Ok(vec![
            statistic("back,BACKEND,", "qcur")?,
            statistic("back,one,", "scur")?,
            statistic("back,one,", "slim")?,
            statistic("back,BACKEND,", "act")?,
        ])
    })?;
    let columns = ["qcur", "qlimit", "scur", "slim"];
    let keys = ["depth", "limit", "serving", "slots"];
    compare(
        haproxy.pid(),
        None,
        "haproxy: server back/one",
        &keys,
        || {
            let all = columns.iter();
            all.map(|name| statistic("back,one,", name)).collect()
        },
    )
}

#[test]
fn clients_that_wait_in_pgbouncer_are_those_of_its_console() -> Result<()> {
    const TEST: &str = "clients_that_wait_in_pgbouncer_are_those_of_its_console";
    if !needs::met(TEST, &["pgbouncer", "psql"]) {
        return Ok(());
    }
    let _alone = alone();
    let postgres = Postgres::start()?;
    let pgbouncer = PgBouncer::start(&postgres, 4)?;
    let port = pgbouncer.port();
    let clients = |count: usize| {
        for _ in 0..count {
            thread::spawn(move || sql_at(port, "postgres", "SELECT pg_sleep(120)"));
        }
    };
    let console = |query: &str, row: &str, columns: &[&str]| -> Result<Vec<u64>> {
        let output = Command::new(program::need(&["psql"])?)
            .args([
                "-X",
                "-A",
                "-F",
                ",",
                "-h",
                "127.0.0.1",
                "-U",
                "postgres",
                "-d",
                "pgbouncer",
            ])
            .args(["-p", &port.to_string(), "-c", query])
            .output()?;
        let text = String::from_utf8(output.stdout)?;
        let mut lines = text.lines();
        let head: Vec<&str> = lines.next().context("no head")?.split(',').collect();
        let line = lines
            .find(|line| line.starts_with(row))
            .with_context(|| text.clone())?;
        let fields: Vec<&str> = line.split(',').collect();
        let field = |name: &&str| -> Result<u64> {
            let at = head.iter().position(|column| column == name);
            let field = fields.get(at.context("no column")?).context("no field")?;
            Ok(field.parse()?)
        };
        columns.iter().map(field).collect()
    };
    let ask = || -> Result<Vec<u64>> {
        let mut all = console(
            "SHOW POOLS",
            "postgres,postgres,",
            &["cl_waiting", "sv_active"],
        )?;
        all.extend(console("SHOW DATABASES", "postgres,127", &["pool_size"])?);
        Ok(all)
    };
    let state = |waiting: u64, active: u64| {
        wait::until("clients to wait", DEADLINE, || {
            let all = ask().ok();
            let is_so = all.is_some_and(|all| all.starts_with(&[waiting, active]));
            Ok(is_so.then_some(()))
        })
    };
    clients(4);
    state(0, 4)?;
    clients(1);
    state(1, 4)?;
    let waiting = Instant::now();
    clients(19);
    state(20, 4)?;
    // 5% of it is longer than a client takes to start.
    thread::sleep(Duration::from_secs(8).saturating_sub(waiting.elapsed()));
    let pid = pgbouncer.process().pid();
    let name = "pgbouncer: pool postgres/postgres";
    let keys = ["depth", "serving", "slots", "oldest_age_ns"];
    compare(pid, None, name, &keys, || {
        let mut all = ask()?;
        all.push(u64::try_from(waiting.elapsed().as_nanos())?);
        Ok(all)
    })
}

#[test]
fn requests_that_wait_in_envoy_are_those_of_its_statistics() -> Result<()> {
    const TEST: &str = "requests_that_wait_in_envoy_are_those_of_its_statistics";
    if !needs::met(TEST, &[]) {
        return Ok(());
    }
    if envoy::find().is_none() {
        skip(TEST, "Envoy is not installed");
        return Ok(());
    }
    let _alone = alone();
    let server = silent_server()?;
    let envoy = envoy::Envoy::start(|front| envoy::limited(front, server, 3, 40))?;
    let _clients = waiting_clients(envoy.address(), 23)?;
    let statistic = |name: &str| envoy.statistic(&format!("cluster.back.{name}"));
    wait::until("20 requests to wait", DEADLINE, || {
        Ok((statistic("upstream_rq_pending_active")? == 20).then_some(()))
    })?;
    let ask = || {
        Ok(vec![
            statistic("upstream_rq_pending_active")?,
            envoy.threshold("back", "max_pending_requests")?,
        ])
    };
    // Its admin port is not one of the usual ones: the user's row says which.
    let temp = TempDir::new("app-envoy")?;
    let row = preset("envoy")?.replace(
        "at = { ports = [9901, 15000, 19000] }",
        &format!("at = {{ ports = [{}] }}", envoy.admin().port()),
    );
    let config = temp.write("tailback.toml", &row)?;
    let pid = envoy.process().pid();
    compare(
        pid,
        Some(&config),
        "envoy: cluster back",
        &["depth", "limit"],
        ask,
    )
}

/// A row of the agent's own, as one of the user's.
fn preset(name: &str) -> Result<String> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../agent/src/app/presets.toml");
    let text = fs::read_to_string(path)?;
    let rows = text.split("[[preset]]\n").skip(1);
    let start = format!("name = \"{name}\"\n");
    let row = rows.into_iter().find(|row| row.starts_with(&start));
    let row = row.with_context(|| format!("no preset {name}"))?;
    Ok(format!(
        "[[app.preset]]\n{}",
        row.replace("[preset.", "[app.preset.")
    ))
}

/// The number that a command of Redis replies.
fn redis_number(redis: &Redis, words: &[&str]) -> Result<u64> {
    match redis.client()?.call(words)? {
        Reply::Number(number) => Ok(u64::try_from(number)?),
        other => anyhow::bail!("{words:?}: {other:?}"),
    }
}

/// The output of a Python program that fills a queue in Redis.
fn run_python(modules: &[&str], redis: &Redis, program: &str) -> Result<String> {
    let output = Command::new(python::with(modules)?)
        .args(["-c", program, &redis.port().to_string()])
        .stdin(Stdio::null())
        .output()?;
    ensure!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(String::from_utf8(output.stdout)?)
}

#[test]
fn tasks_of_celery_in_redis_are_counted() -> Result<()> {
    const TEST: &str = "tasks_of_celery_in_redis_are_counted";
    if !needs::met(TEST, &["redis-server"]) {
        return Ok(());
    }
    if let Err(missing) = python::with(&["celery", "redis"]) {
        skip(TEST, &missing.to_string());
        return Ok(());
    }
    let _alone = alone();
    let redis = Redis::start()?;
    run_python(
        &["celery", "redis"],
        &redis,
        "import sys\nfrom celery import Celery\napp = Celery(broker=f'redis://127.0.0.1:{sys.argv[1]}/0')\n\
         for _ in range(37): app.send_task('bill', queue='orders')\n",
    )?;
    let mut worker = Command::new(python::with(&["celery", "redis"])?);
    worker
        .args([
            "-m",
            "celery",
            "-b",
            &format!("redis://127.0.0.1:{}/0", redis.port()),
        ])
        .args(["worker", "-Q", "mail", "-P", "solo"])
        // It may not run as root otherwise.
        .env("C_FORCE_ROOT", "1");
    let _worker = Process::start("a worker of Celery", &mut worker)?;
    wait::until("the worker's own queues", DEADLINE, || {
        let own = ["_kombu.binding.celery.pidbox", "_kombu.binding.celeryev"];
        let [control, events] = own.map(|key| redis_number(&redis, &["SCARD", key]));
        Ok((control? > 0 && events? > 0).then_some(()))
    })?;
    let pid = redis.process().pid();
    compare(pid, None, "redis: celery orders", &["depth"], || {
        Ok(vec![redis_number(&redis, &["LLEN", "orders"])?])
    })?;
    let sample = Sample::of_process(pid)?;
    let names: Vec<&str> = sample
        .queues("app")
        .filter_map(|queue| queue["name"].as_str())
        .collect();
    ensure!(
        names == ["redis: celery mail", "redis: celery orders"],
        "{names:?}"
    );
    Ok(())
}

#[test]
fn jobs_of_rq_in_redis_are_counted() -> Result<()> {
    const TEST: &str = "jobs_of_rq_in_redis_are_counted";
    if !needs::met(TEST, &["redis-server"]) {
        return Ok(());
    }
    if let Err(missing) = python::with(&["rq"]) {
        skip(TEST, &missing.to_string());
        return Ok(());
    }
    let _alone = alone();
    let redis = Redis::start()?;
    let output = run_python(
        &["rq"],
        &redis,
        "import sys, time\nfrom redis import Redis\nfrom rq import Queue\n\
         queue = Queue('mail', connection=Redis(port=int(sys.argv[1])))\n\
         print(time.time())\n\
         for _ in range(41): queue.enqueue('time.sleep', 1)\n",
    )?;
    let enqueued: f64 = output.trim().parse()?;
    // 5% of it is longer than the library takes.
    thread::sleep(Duration::from_secs(5));
    let pid = redis.process().pid();
    let keys = ["depth", "consumers", "oldest_age_ns"];
    compare(pid, None, "redis: rq mail", &keys, || {
        let now = SystemTime::now().duration_since(UNIX_EPOCH)?;
        let age_ns = (now.as_secs_f64() - enqueued) * 1e9;
        Ok(vec![
            redis_number(&redis, &["LLEN", "rq:queue:mail"])?,
            0,
            age_ns as u64,
        ])
    })
}

#[test]
fn the_lag_of_a_stream_in_redis_is_that_of_its_group() -> Result<()> {
    const TEST: &str = "the_lag_of_a_stream_in_redis_is_that_of_its_group";
    if !needs::met(TEST, &["redis-server"]) {
        return Ok(());
    }
    let _alone = alone();
    let redis = Redis::start()?;
    let mut client = redis.client()?;
    client.call(&["XGROUP", "CREATE", "events", "billing", "0", "MKSTREAM"])?;
    for _ in 0..50 {
        client.call(&["XADD", "events", "*", "id", "1"])?;
    }
    client.call(&[
        "XREADGROUP",
        "GROUP",
        "billing",
        "one",
        "COUNT",
        "10",
        "STREAMS",
        "events",
        ">",
    ])?;
    let field = |name: &str| -> Result<u64> {
        let Reply::Many(groups) = redis.client()?.call(&["XINFO", "GROUPS", "events"])? else {
            anyhow::bail!("no groups");
        };
        let Some(Reply::Many(group)) = groups.first() else {
            anyhow::bail!("no group");
        };
        let at = group
            .iter()
            .position(|one| *one == Reply::Text(name.to_owned()));
        match group.get(at.context("no field")? + 1) {
            Some(Reply::Number(number)) => Ok(u64::try_from(*number)?),
            other => anyhow::bail!("{name}: {other:?}"),
        }
    };
    let pid = redis.process().pid();
    let keys = ["depth", "serving", "consumers"];
    compare(pid, None, "redis: stream events of billing", &keys, || {
        ["lag", "pending", "consumers"]
            .iter()
            .map(|name| field(name))
            .collect()
    })?;
    // 50 a second enter, 25 leave.
    let interval = Duration::from_millis(20);
    let name = "redis: stream events of billing";
    compare_rates((pid, None, name), interval, (50.0, 25.0), |step| {
        client.call(&["XADD", "events", "*", "id", "1"])?;
        if step % 2 == 0 {
            client.call(&[
                "XREADGROUP",
                "GROUP",
                "billing",
                "one",
                "COUNT",
                "1",
                "STREAMS",
                "events",
                ">",
            ])?;
        }
        Ok(())
    })
}

#[test]
fn messages_in_rabbitmq_are_those_of_rabbitmqctl() -> Result<()> {
    const TEST: &str = "messages_in_rabbitmq_are_those_of_rabbitmqctl";
    if !needs::met(TEST, &["rabbitmq-server", "epmd"]) {
        return Ok(());
    }
    if let Err(missing) = python::with(&["amqp"]) {
        skip(TEST, &missing.to_string());
        return Ok(());
    }
    // Debian's script changes the user; the one beside the library does not.
    let library = "/usr/lib/rabbitmq/bin";
    if !Path::new(library).is_dir() {
        skip(TEST, "RabbitMQ is not Debian's");
        return Ok(());
    }
    let _alone = alone();
    let temp = TempDir::new("app-rabbitmq")?;
    let (port, dist) = (ports::free()?, ports::free()?);
    let (prometheus, names) = (ports::free()?, ports::free()?);
    // RabbitMQ would start one that outlives it.
    let mut epmd = Command::new(program::need(&["epmd"])?);
    epmd.args(["-address", "127.0.0.1", "-port", &names.to_string()]);
    let _epmd = Process::start("epmd", &mut epmd)?;
    let plugins = temp.write("enabled_plugins", "[rabbitmq_prometheus].\n")?;
    let config = temp.write(
        "rabbitmq.conf",
        &format!("listeners.tcp.1 = 127.0.0.1:{port}\nprometheus.tcp.ip = 127.0.0.1\nprometheus.tcp.port = {prometheus}\n"),
    )?;
    let node = format!("tailback{port}@localhost");
    let at = temp.path().display().to_string();
    let environment = [
        ("HOME", at.clone()),
        ("RABBITMQ_NODENAME", node.clone()),
        ("RABBITMQ_CONFIG_FILE", config.display().to_string()),
        (
            "RABBITMQ_ENABLED_PLUGINS_FILE",
            plugins.display().to_string(),
        ),
        ("RABBITMQ_MNESIA_BASE", at.clone()),
        ("RABBITMQ_LOG_BASE", at.clone()),
        ("RABBITMQ_LOGS", "-".to_owned()),
        ("RABBITMQ_DIST_PORT", dist.to_string()),
        ("ERL_EPMD_PORT", names.to_string()),
        ("RABBITMQ_USE_LONGNAME", "false".to_owned()),
    ];
    let mut command = Command::new(format!("{library}/rabbitmq-server"));
    command.envs(environment.clone()).current_dir(temp.path());
    let server = Process::start("RabbitMQ", &mut command)?;
    wait::until_ok("RabbitMQ's metrics", Duration::from_secs(180), || {
        let response = http::get_1_1(ports::local(prometheus), "/metrics", Duration::from_secs(5))?;
        ensure!(response.status == 200, "{}", response.status);
        Ok(())
    })?;
    let output = Command::new(python::with(&["amqp"])?)
        .args(["-c", PUBLISH, &port.to_string()])
        .output()?;
    ensure!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let ask = || -> Result<Vec<u64>> {
        let output = Command::new(format!("{library}/rabbitmqctl"))
            .envs(environment.clone())
            .args(["-n", &node, "-q", "--no-table-headers", "list_queues"])
            .args([
                "name",
                "messages_ready",
                "messages_unacknowledged",
                "consumers",
            ])
            .output()?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let line = text.lines().find(|line| line.starts_with("orders"));
        let line =
            line.with_context(|| format!("{text} {}", String::from_utf8_lossy(&output.stderr)))?;
        line.split_ascii_whitespace()
            .skip(1)
            .map(|field| Ok(field.parse()?))
            .collect()
    };
    wait::until("RabbitMQ to count 60 messages", DEADLINE, || {
        Ok((ask()?.first() == Some(&60)).then_some(()))
    })?;
    let temp = TempDir::new("app-rabbitmq-config")?;
    let row = preset("rabbitmq")?.replace("[15692, 15691]", &format!("[{prometheus}]"));
    let config = temp.write("tailback.toml", &row)?;
    let keys = ["depth", "serving", "consumers"];
    let beam = beam_of(server.pid())?;
    let name = "rabbitmq: //orders";
    compare(beam, Some(&config), name, &keys, ask)?;
    let mut load = Command::new(python::with(&["amqp"])?);
    load.args(["-c", PUBLISH, &port.to_string(), "50"]);
    let load = Process::start("the load", &mut load)?;
    compare_rates(
        (beam, Some(&config), name),
        Duration::from_secs(1),
        (50.0, 25.0),
        |_| load.check_running(),
    )
}

/// 60 messages, as kombu's transport publishes them; then, if there is a second number, that many a second, of which every other one
/// is taken.
const PUBLISH: &str = "
import sys, amqp, time
connection = amqp.Connection(host=f'127.0.0.1:{sys.argv[1]}')
connection.connect()
channel = connection.channel()
channel.queue_declare('orders', durable=True, auto_delete=False)
for at in range(60):
    channel.basic_publish(amqp.Message('x'), routing_key='orders')
due = time.monotonic()
while len(sys.argv) > 2:
    channel.basic_publish(amqp.Message('x'), routing_key='orders')
    if at % 2: channel.basic_get('orders', no_ack=True)
    at += 1
    due += 1 / int(sys.argv[2])
    time.sleep(max(0, due - time.monotonic()))
connection.close()
";

/// The Erlang machine below a process.
fn beam_of(pid: u32) -> Result<u32> {
    let mut pids = vec![pid];
    while let Some(pid) = pids.pop() {
        let comm = fs::read_to_string(format!("/proc/{pid}/comm"))?;
        if comm.trim() == "beam.smp" {
            return Ok(pid);
        }
        pids.extend(tailback_tests::process::children_of(pid)?);
    }
    anyhow::bail!("no beam.smp below process {pid}")
}

#[test]
fn messages_in_jetstream_are_those_of_its_consumer() -> Result<()> {
    const TEST: &str = "messages_in_jetstream_are_those_of_its_consumer";
    if !needs::met(TEST, &["nats-server"]) {
        return Ok(());
    }
    let _alone = alone();
    let temp = TempDir::new("app-nats")?;
    let (port, monitor) = (ports::free()?, ports::free()?);
    let mut command = Command::new(program::need(&["nats-server"])?);
    command
        .args([
            "-a",
            "127.0.0.1",
            "-p",
            &port.to_string(),
            "-m",
            &monitor.to_string(),
            "-js",
            "-sd",
        ])
        .arg(temp.path());
    let nats = Process::start("NATS", &mut command)?;
    let connect = || -> Result<Nats> { Nats::connect(port) };
    let mut client = wait::until_ok("NATS to listen", DEADLINE, connect)?;
    client.request(
        "$JS.API.STREAM.CREATE.ORDERS",
        r#"{"name":"ORDERS","subjects":["orders"],"retention":"limits","storage":"memory","max_msgs":-1,"num_replicas":1}"#,
    )?;
    client.request(
        "$JS.API.CONSUMER.DURABLE.CREATE.ORDERS.billing",
        r#"{"stream_name":"ORDERS","config":{"durable_name":"billing","ack_policy":"explicit","max_ack_pending":500}}"#,
    )?;
    for _ in 0..80 {
        client.request("orders", "x")?;
    }
    client.request("$JS.API.CONSUMER.MSG.NEXT.ORDERS.billing", r#"{"batch":1}"#)?;
    // The client's own protocol, not the monitoring port that the agent reads.
    let ask = || {
        let info = connect()?.request("$JS.API.CONSUMER.INFO.ORDERS.billing", "")?;
        let info: Value = serde_json::from_str(&info)?;
        Ok(vec![
            number(&info, "num_pending")?,
            number(&info, "num_ack_pending")?,
            number(&info["config"], "max_ack_pending")?,
        ])
    };
    let keys = ["depth", "serving", "slots"];
    let name = "nats: stream ORDERS of billing";
    compare(nats.pid(), None, name, &keys, ask)?;
    // 50 a second enter, 25 leave.
    let interval = Duration::from_millis(20);
    compare_rates((nats.pid(), None, name), interval, (50.0, 25.0), |step| {
        client.request("orders", "x")?;
        if step % 2 == 0 {
            client.request("$JS.API.CONSUMER.MSG.NEXT.ORDERS.billing", r#"{"batch":1}"#)?;
        }
        Ok(())
    })
}

/// A client of NATS with one subscription, for replies.
struct Nats {
    stream: BufReader<TcpStream>,
}

impl Nats {
    fn connect(port: u16) -> Result<Self> {
        let stream = TcpStream::connect(ports::local(port))?;
        stream.set_read_timeout(Some(PATIENCE))?;
        let mut client = Self {
            stream: BufReader::new(stream),
        };
        client.line()?;
        client.send("CONNECT {\"verbose\":false}\r\nSUB replies 1\r\n")?;
        Ok(client)
    }

    fn send(&mut self, text: &str) -> Result<()> {
        Ok(self.stream.get_mut().write_all(text.as_bytes())?)
    }

    fn line(&mut self) -> Result<String> {
        let mut line = String::new();
        self.stream.read_line(&mut line)?;
        ensure!(!line.is_empty(), "NATS closed the connection");
        Ok(line.trim_end().to_owned())
    }

    /// The reply to a request.
    fn request(&mut self, subject: &str, body: &str) -> Result<String> {
        self.send(&format!(
            "PUB {subject} replies {}\r\n{body}\r\n",
            body.len()
        ))?;
        loop {
            let line = self.line()?;
            if line == "PING" {
                self.send("PONG\r\n")?;
            } else if line.starts_with("MSG ") {
                let len: usize = line.rsplit(' ').next().unwrap_or_default().parse()?;
                let mut bytes = vec![0; len + 2];
                self.stream.read_exact(&mut bytes)?;
                bytes.truncate(len);
                return Ok(String::from_utf8(bytes)?);
            } else {
                ensure!(!line.starts_with("-ERR"), "{line}");
            }
        }
    }
}
