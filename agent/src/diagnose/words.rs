//! A verdict in words: one sentence of evidence with numbers, one of advice with the parameter, its present value and what
//! would be enough.

use std::collections::BTreeSet;

use super::{
    Activity, Cause,
    classify::Object,
    profile::Thread,
    rules::{Case, Finding, Limit, idle_in_transaction},
    wait_graph::{End, Step},
};
use crate::{
    event::{DrivenBy, share_of},
    queue::Kind,
    text::{count, duration, rate},
};

/// Processes of a crowd that are named.
const NAMED: usize = 3;
const SECOND_NS: f64 = 1e9;

fn percent(share: f64) -> String {
    format!("{:.0}%", share * 100.0)
}

/// `worker-3 (815) of api (790)`.
pub(super) fn thread(case: Case<'_>, thread: Thread) -> String {
    let process = case.view.world.process(thread.0, case.view.targets);
    match case.view.profile.comm(thread) {
        // The main thread, under the name of all.
        Some(comm) if process == format!("{comm} ({})", thread.1) => process,
        Some(comm) => format!("thread {comm} ({}) of {process}", thread.1),
        None => format!("thread {} of {process}", thread.1),
    }
}

/// The processes of a step: `postgres (812)`, `uwsgi (20, 21, 22 and 1 more)`.
pub(super) fn crowd(case: Case<'_>, step: &Step) -> String {
    if let Some(one) = step.thread {
        return thread(case, one);
    }
    let tgids: BTreeSet<u32> = step
        .crowd
        .members
        .iter()
        .map(|((tgid, _), _)| *tgid)
        .collect();
    let name = case.view.world.name(step.tgid, case.view.targets);
    let named: Vec<String> = tgids.iter().take(NAMED).map(u32::to_string).collect();
    match tgids.len().saturating_sub(NAMED) {
        0 => format!("{name} ({})", named.join(", ")),
        more => format!("{name} ({} and {more} more)", named.join(", ")),
    }
}

/// What most of a step's time goes into: `96% waiting for 127.0.0.1:5432`.
pub(super) fn busy_with(case: Case<'_>, step: &Step) -> String {
    if let Some(titled) = idle_in_transaction(case, step) {
        let since_ns = case.view.window.to_ns.saturating_sub(titled.since_ns);
        let mut text = format!("idle in a transaction for at least {}", duration(since_ns));
        if let Some(client) = client(case, step.tgid) {
            text.push_str(&format!(", its client is {client}"));
        }
        return text;
    }
    let share = percent(step.share);
    let what = step.activity.words();
    match (&step.activity, of_what(case, step)) {
        (Activity::Downstream, Some(of)) => format!("{share} waiting for {of}"),
        (Activity::Lock, Some(of)) => format!("{share} waiting for {of}"),
        (_, Some(of)) => format!("{share} {what}: {of}"),
        (_, None) => format!("{share} {what}"),
    }
}

/// What a step waits for, in words.
fn of_what(case: Case<'_>, step: &Step) -> Option<String> {
    let world = case.view.world;
    Some(match &step.object {
        Object::None | Object::Parked => return None,
        Object::Connection(cookie) => {
            let link = world.link(*cookie)?;
            // A request in work says nothing about what it waits for.
            if step.activity == Activity::Inside {
                return None;
            }
            match world.other_end(link) {
                Some(end) => format!(
                    "{} at {}",
                    world.name(end.tgid, case.view.targets),
                    link.remote
                ),
                None => link.remote.to_string(),
            }
        }
        Object::Lock {
            interpreter: true, ..
        } => "the interpreter's lock".to_owned(),
        Object::Lock { address, .. } => format!("the lock at {address:#x}"),
        Object::Titled => "a lock of its own service, as its title says".to_owned(),
        Object::File { path, device } => match device {
            Some(device) => format!("{path} on {device}"),
            None => path.clone(),
        },
        Object::Pipe(inode) => format!("pipe:[{inode}]"),
        Object::Unix(inode) => match world
            .unix(*inode)
            .and_then(|socket| socket.peer_path.clone())
        {
            Some(path) => path,
            None => format!("socket:[{inode}]"),
        },
    })
}

/// Who called a process that serves one client.
fn client(case: Case<'_>, tgid: u32) -> Option<String> {
    let world = case.view.world;
    let accepted = |link: &&super::topology::Link| link.tgid == tgid && link.accepted;
    let mut links = world.links().map(|(_, link)| link).filter(accepted);
    let link = links.next().filter(|_| links.next().is_none())?;
    Some(match world.other_end(link) {
        Some(end) => world.process(end.tgid, case.view.targets),
        None => link.remote.to_string(),
    })
}

/// One sentence.
pub(super) fn evidence(case: Case<'_>, finding: &Finding, steps: &[Step]) -> String {
    let mut parts: Vec<String> = Vec::new();
    parts.extend(first_of_all(case, finding));
    if let Some(first) = steps.first() {
        let window_ns = case
            .view
            .window
            .to_ns
            .saturating_sub(case.view.window.from_ns);
        let threads = first.crowd.len();
        let plural = if threads == 1 { "thread" } else { "threads" };
        parts.push(format!(
            "{threads} {plural} of {} spent {} in {}",
            case.view.world.name(first.tgid, case.view.targets),
            busy_with(case, first),
            duration(window_ns)
        ));
    }
    for step in steps.iter().skip(1) {
        parts.push(format!("{}: {}", crowd(case, step), busy_with(case, step)));
    }
    match steps.last().and_then(|last| last.end.as_ref()) {
        Some(End::Away(name)) => parts.push(format!("{name} is not on this machine, or not seen")),
        Some(End::Unseen(tgid)) => parts.push(format!(
            "what {} does is not seen",
            case.view.world.process(*tgid, case.view.targets)
        )),
        Some(End::Cycle) => parts.push("they wait for each other".to_owned()),
        _ => {}
    }
    parts.join("; ")
}

/// What is said before the threads are: the fact that decides.
fn first_of_all(case: Case<'_>, finding: &Finding) -> Option<String> {
    let episode = case.episode;
    match finding.cause {
        Cause::PoolExhausted => {
            let pool = finding.pool.as_ref()?;
            let answer = pool
                .answer_ns
                .map(|ns| format!(", an answer takes {}", duration(ns)));
            let usual = if pool.usual_known {
                ""
            } else {
                " (whether that is usual was not seen)"
            };
            Some(format!(
                "all {} connections to {} are in use at nearly every look while {} requests are in work{}{usual}",
                pool.connections,
                pool.endpoint,
                count(pool.inflight),
                answer.unwrap_or_default()
            ))
        }
        Cause::DownstreamSlow => {
            let endpoint = finding.culprit.as_ref()?.endpoint.as_ref()?;
            let (now, usual) = case.facts.answers(episode.key.target, endpoint);
            let (now, usual) = (now?, usual?);
            Some(format!(
                "an answer of {endpoint} takes {} (usually {})",
                duration(now as u64),
                duration(usual as u64)
            ))
        }
        Cause::ProducerSurge => {
            let (now, usual) = (episode.arrival_rate?, episode.baseline_arrival_rate?);
            let served = episode
                .service_rate
                .map(|out| format!(", {}/s are served", rate(out)));
            Some(format!(
                "{}/s come (usually {}/s){}",
                rate(now),
                rate(usual),
                served.unwrap_or_default()
            ))
        }
        Cause::FdExhausted => {
            let reading = case.facts.open_files(episode.key.target)?;
            Some(format!(
                "{} of {} file descriptors are open",
                count(reading.depth),
                count(reading.limit.unwrap_or(0))
            ))
        }
        Cause::UndersizedLimit if finding.limit == Some(Limit::Backlog) => Some(format!(
            "{} connections were refused or dropped at a backlog of {} although the workers had time left",
            count(episode.losses),
            count(episode.limit.unwrap_or(0))
        )),
        Cause::CpuStarved => {
            let hog = case
                .facts
                .hog(episode.key.target, case.view.targets, case.time())?;
            Some(format!(
                "{} ({}) uses {} of a CPU",
                hog.name,
                hog.tgid,
                percent(hog.share)
            ))
        }
        Cause::CpuThrottled => {
            let target = case.view.targets.get(episode.key.target)?;
            let quota = case.facts.cgroup(target)?.quota_millicpus?;
            Some(format!("its quota is {:.2} CPUs", quota as f64 / 1e3))
        }
        _ => None,
    }
}

/// Workers, the time one request keeps one of them, what they serve, what comes, and how many would be enough.
struct Arithmetic {
    workers: usize,
    each_ns: u64,
    served: f64,
    come: f64,
    enough: u64,
}

impl Arithmetic {
    fn of(case: Case<'_>, steps: &[Step]) -> Option<Self> {
        let first = steps.first()?;
        let episode = case.episode;
        // Rates of bytes say nothing about requests.
        if matches!(
            episode.key.kind,
            Kind::Recv | Kind::Send | Kind::Udp | Kind::Pipe
        ) {
            return None;
        }
        // A loop that keeps requests for reasons of its own serves many at once: they keep none of its threads.
        if first.activity == Activity::Inside && matches!(first.object, Object::Connection(_)) {
            return None;
        }
        let served = episode.service_rate.filter(|rate| *rate > 0.0)?;
        let come = episode.arrival_rate.map_or(served, |come| come.max(served));
        let idle = share_of(&first.shares, Activity::Idle);
        let workers = first.crowd.len();
        let each = workers as f64 * (1.0 - idle) / served;
        Some(Self {
            workers,
            each_ns: (each * SECOND_NS) as u64,
            served,
            come,
            // A pool that is busy to the last worker has no room for chance.
            enough: (come * each / 0.85).ceil().max(workers as f64 + 1.0) as u64,
        })
    }

    fn words(&self) -> String {
        format!(
            "{} workers × {} per request serve {}/s, {}/s come: {} workers would keep up",
            self.workers,
            duration(self.each_ns),
            rate(self.served),
            rate(self.come),
            self.enough
        )
    }
}

/// What to do.
pub(super) fn advice(case: Case<'_>, finding: &Finding, steps: &[Step]) -> String {
    let culprit = finding.culprit.as_ref().map(|culprit| culprit.name.clone());
    let who = culprit.as_deref().unwrap_or("it");
    let arithmetic = Arithmetic::of(case, steps);
    match finding.cause {
        Cause::ProducerSurge => match arithmetic {
            Some(sum) => format!("Shed or limit the callers now. {}.", sum.words()),
            None => "Shed or limit the callers now; then add capacity.".to_owned(),
        },
        Cause::CpuStarved => format!(
            "Move {who} elsewhere, or give this service's control group more weight (cpu.weight, cpu.shares) or CPUs of its own."
        ),
        Cause::CpuThrottled => throttled(case, steps),
        Cause::CpuBound => {
            let more = arithmetic.map(|sum| format!(" {}.", sum.words()));
            format!(
                "{who} computes all the time: profile it (perf top -p PID), or give the service more CPUs; more threads alone do not help.{}",
                more.filter(|_| case.episode.driven_by == DrivenBy::Producer)
                    .unwrap_or_default()
            )
        }
        Cause::LockContention => lock(case, who, steps),
        Cause::DownstreamSlow => downstream(case, who, steps),
        Cause::PoolExhausted => pool(case, finding),
        Cause::UndersizedLimit => match finding.limit {
            Some(Limit::Backlog) => backlog(case),
            _ => match arithmetic {
                Some(sum) => format!("{}. Nothing outside of the service keeps them.", sum.words()),
                None => "All workers are busy with work that takes its time: add workers.".to_owned(),
            },
        },
        Cause::ConsumerStalled if finding.cycle => format!(
            "They wait for each other and will not go on by themselves: take a stack of {who} (gdb -p PID, py-spy dump), then restart it."
        ),
        Cause::ConsumerStalled => format!(
            "{who} does nothing: if it is stopped, `kill -CONT` lets it go on; else take its stacks, then restart it. Send callers elsewhere meanwhile."
        ),
        Cause::EventLoopBlocked => format!(
            "{who} computes in one turn of its loop, and everybody else waits: find the handler (py-spy dump, perf top -p PID) and move it to a worker."
        ),
        Cause::DiskSlow => format!(
            "Look at the device behind {who} (iostat -x 1) and at who else writes to it; batch or defer what is flushed."
        ),
        Cause::OutputBlocked => format!(
            "{who} does not read what is written to it: mend or restart the reader, or let the service write to a file; log less meanwhile."
        ),
        Cause::MemoryStalled => {
            "Raise the memory limit (memory.max, memory.limit_in_bytes) or let the service hold less; look at what grew.".to_owned()
        }
        Cause::PeerNotReading => format!(
            "{who} does not read what is sent to it: bound what is kept for one peer, time it out, and look at what it waits for."
        ),
        Cause::PeerNotSending => format!(
            "Workers wait for clients that do not send what they began{}: set a read timeout, or put a proxy that buffers requests in front.",
            culprit.as_ref().map_or_else(String::new, |who| format!(" ({who})"))
        ),
        Cause::NetworkLimited => format!(
            "The way to {who} carries no more: look at its bandwidth and losses (ss -ti, tc -s qdisc); compress, send less, or spread it."
        ),
        Cause::FdExhausted => format!(
            "{who} is reached: raise it (LimitNOFILE=, ulimit -n), and look for what is left open (ls -l /proc/PID/fd)."
        ),
        Cause::Unknown => case.episode.key.kind.advice().to_owned(),
    }
}

fn throttled(case: Case<'_>, steps: &[Step]) -> String {
    let target = case.view.targets.get(case.episode.key.target);
    let quota = target
        .and_then(|target| case.facts.cgroup(target))
        .and_then(|group| group.quota_millicpus)
        .map(|millicpus| millicpus as f64 / 1e3);
    let Some((quota, first)) = quota.zip(steps.first()) else {
        return "Raise the CPU quota of its control group (cpu.max, cpu.cfs_quota_us).".to_owned();
    };
    let of = |activity| share_of(&first.shares, activity);
    let wanted = (of(Activity::OnCpu) + of(Activity::Throttled)) * first.crowd.len() as f64;
    format!(
        "Raise the CPU quota of its control group (cpu.max, cpu.cfs_quota_us) from {quota:.2} to about {:.2} CPUs, or lower the load.",
        wanted.max(quota * 1.2)
    )
}

fn lock(case: Case<'_>, who: &str, steps: &[Step]) -> String {
    let interpreter = steps.iter().any(|step| {
        matches!(
            step.object,
            Object::Lock {
                interpreter: true,
                ..
            }
        )
    });
    if interpreter {
        return "Its threads take turns on the interpreter's lock: more threads cannot help, more processes can.".to_owned();
    }
    if let Some(holder) = steps
        .last()
        .and_then(|last| idle_in_transaction(case, last))
    {
        let since = case.view.window.to_ns.saturating_sub(holder.since_ns);
        return format!(
            "End the transaction of {who}, idle for {}, or its client; set idle_in_transaction_session_timeout.",
            duration(since)
        );
    }
    format!(
        "{who} holds the lock while it works: make what it does under it shorter, or split the lock; more workers only wait longer."
    )
}

fn downstream(case: Case<'_>, who: &str, steps: &[Step]) -> String {
    if let Some(last) = steps.last()
        && let Some(holder) = idle_in_transaction(case, last)
    {
        let since = case.view.window.to_ns.saturating_sub(holder.since_ns);
        return format!(
            "End the transaction of {who}, idle for {} (pg_terminate_backend({}) for PostgreSQL), or its client; more workers here would only wait, too.",
            duration(since),
            last.tgid
        );
    }
    let deepest = steps.last().filter(|_| steps.len() > 1);
    let there = match deepest.map(|step| step.activity) {
        Some(Activity::OnCpu | Activity::RunnableOwn) => {
            format!("{who} is busy computing: find the slow query or command there.")
        }
        Some(Activity::Disk) => format!("{who} waits for its disk: look at the device there."),
        Some(Activity::Lock) => format!("{who} stands behind a lock: see who holds it."),
        Some(Activity::Stopped) => format!("{who} is stopped: `kill -CONT` lets it go on."),
        _ => format!("Look at {who}."),
    };
    format!(
        "{there} Until then shorten the timeout or open the circuit; more workers here would only wait, too."
    )
}

fn pool(case: Case<'_>, finding: &Finding) -> String {
    let Some(pool) = &finding.pool else {
        return "Raise the pool, or hold a connection for less long.".to_owned();
    };
    let sum = pool.answer_ns.and_then(|answer_ns| {
        let answer = answer_ns as f64 / SECOND_NS;
        let come = case.episode.arrival_rate.filter(|_| case.episode.key.kind != Kind::Recv)?;
        let carries = pool.connections as f64 / answer.max(1e-6);
        let enough = (come * answer / 0.85).ceil() as u64;
        (enough > pool.connections).then(|| {
            format!(
                "{} connections × {} per answer carry {}/s, {}/s come: {enough} connections would keep up, if {} can",
                pool.connections,
                duration(answer_ns),
                rate(carries),
                rate(come),
                pool.endpoint
            )
        })
    });
    let raise = match sum {
        Some(sum) => format!("{sum}."),
        None => format!(
            "Raise the pool of {} connections to {}, if that one can take more, or hold each for less long.",
            pool.connections, pool.endpoint
        ),
    };
    if pool.usual_known {
        return raise;
    }
    format!(
        "{raise} If {} used to answer faster, look there first.",
        pool.endpoint
    )
}

fn backlog(case: Case<'_>) -> String {
    let episode = case.episode;
    let now = episode.limit.unwrap_or(0);
    let enough = episode
        .arrival_rate
        .map_or(now * 4, |come| (come as u64).max(now * 4))
        .max(128);
    format!(
        "Raise the backlog from {} to {} or more (the listen call's argument, and net.core.somaxconn): bursts are larger than it, and the workers have time.",
        count(now),
        count(enough)
    )
}
