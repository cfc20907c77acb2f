//! Phrases of evidence and advice: names of threads and processes, and what they do.

use super::{
    case::Case,
    classify::{Resource, Thread},
    listening_sockets::Uneven,
    profile::TURNS,
    topology::{DNS_PORT, Link},
    wait_graph::Step,
};
use crate::{event::Activity, sample::SharedLock, text::duration};

/// Maximum number of process ids listed; the rest are counted.
const MAX_LISTED: usize = 3;

/// `93%`.
pub(super) fn percent(share: f64) -> String {
    format!("{:.0}%", share * 100.0)
}

/// `thread worker-3 (815) of api (790)`.
pub(super) fn thread(case: Case<'_>, thread: Thread) -> String {
    let process = case.view.topology.process(thread.0, case.view.targets);
    match case.view.profile.comm(thread) {
        // The main thread, whose name is that of its process.
        Some(comm) if process == format!("{comm} ({})", thread.1) => process,
        Some(comm) => format!("thread {comm} ({}) of {process}", thread.1),
        None => format!("thread {} of {process}", thread.1),
    }
}

/// The processes of a step: `postgres (812)`, `uwsgi (20, 21, 22 and 1 more)`.
pub(super) fn processes(case: Case<'_>, step: &Step) -> String {
    if let Some(one) = step.thread {
        return thread(case, one);
    }
    let tgids = step.threads.tgids();
    let name = case.view.topology.name(step.tgid, case.view.targets);
    let listed: Vec<String> = tgids.iter().take(MAX_LISTED).map(u32::to_string).collect();
    match tgids.len().saturating_sub(MAX_LISTED) {
        0 => format!("{name} ({})", listed.join(", ")),
        more => format!("{name} ({} and {more} more)", listed.join(", ")),
    }
}

/// The main activity of a step: `96% waiting for 127.0.0.1:5432`.
pub(super) fn busy_with(case: Case<'_>, step: &Step) -> String {
    if let Some(idle_ns) = idle_in_transaction_ns(case, step) {
        let mut text = format!("idle in a transaction for at least {}", duration(idle_ns));
        if let Some(client) = only_client(case, step.tgid) {
            text.push_str(&format!(", its client is {client}"));
        }
        return text;
    }
    let share = percent(step.share);
    let activity = step.activity.words();
    match (step.activity, resource(case, step)) {
        (Activity::Downstream, Some(of)) => format!("{share} waiting for {of}"),
        (Activity::Lock, Some(of)) => format!("{share} waiting for {of}"),
        (_, Some(of)) => format!("{share} {activity}: {of}"),
        (_, None) => format!("{share} {activity}"),
    }
}

/// The resource that a step waits for.
fn resource(case: Case<'_>, step: &Step) -> Option<String> {
    let topology = case.view.topology;
    Some(match &step.resource {
        Resource::None | Resource::Client(_) | Resource::Parked => return None,
        Resource::Connection(cookie) => {
            let link = topology.link(*cookie)?;
            // The connection of the request in service says nothing about what the request waits for.
            if step.activity == Activity::Inside {
                return None;
            }
            match topology.other_end(link) {
                Some(end) => format!(
                    "{} at {}",
                    topology.name(end.tgid, case.view.targets),
                    link.remote
                ),
                None if link.connecting => {
                    format!("{} to answer the connection request", link.remote)
                }
                None => link.remote.to_string(),
            }
        }
        Resource::Datagrams(remote) if remote.port() == DNS_PORT => {
            format!("the resolver at {remote}")
        }
        Resource::Datagrams(remote) if remote.port() == 0 => {
            "a datagram from an address that is not known".to_owned()
        }
        Resource::Datagrams(remote) => format!("{remote} (UDP)"),
        Resource::Lock { address: TURNS, .. } => "its turn (one thread runs at a time)".to_owned(),
        Resource::Lock {
            interpreter: true, ..
        } => "the interpreter's lock".to_owned(),
        Resource::Lock { address, .. } => format!("the lock at {address:#x}"),
        Resource::SharedLock { lock, .. } => shared_lock(lock),
        Resource::Accelerator(through) => through.name().to_owned(),
        Resource::RowLock => "a row lock (reported by its process title)".to_owned(),
        Resource::File { path, device } => match device {
            Some(device) => format!("{path} on {device}"),
            None => path.clone(),
        },
        Resource::Pipe(inode) => format!("pipe:[{inode}]"),
        Resource::Unix(inode) => match topology
            .unix(*inode)
            .and_then(|socket| socket.peer_path.clone())
        {
            Some(path) => path,
            None => format!("socket:[{inode}]"),
        },
    })
}

/// A lock that processes share.
pub(super) fn shared_lock(lock: &SharedLock) -> String {
    match lock {
        SharedLock::File { path, polled } => {
            let path = path.as_deref().unwrap_or("a file");
            let polls = if *polled {
                " (sleeping between attempts)"
            } else {
                ""
            };
            format!("the lock on {path}{polls}")
        }
        SharedLock::Memory { address } => {
            format!("the lock at {address:#x} that processes share")
        }
    }
}

/// `98% of the waiting connections are in 1 of 4 listening sockets (SO_REUSEPORT), and 3 are empty`.
pub(super) fn uneven(uneven: &Uneven) -> String {
    let Uneven {
        sockets,
        standing,
        free,
        waiting,
        ..
    } = uneven;
    let are = if *free == 1 { "is" } else { "are" };
    format!(
        "{} of the waiting connections are in {standing} of {sockets} listening sockets (SO_REUSEPORT), and {free} {are} empty",
        percent(*waiting)
    )
}

/// The client of a process that serves exactly one.
fn only_client(case: Case<'_>, tgid: u32) -> Option<String> {
    let topology = case.view.topology;
    let accepted = |link: &&Link| link.tgid == tgid && link.accepted;
    let mut links = topology.links().map(|(_, link)| link).filter(accepted);
    let link = links.next().filter(|_| links.next().is_none())?;
    Some(match topology.other_end(link) {
        Some(end) => topology.process(end.tgid, case.view.targets),
        None => link.remote.to_string(),
    })
}

/// How long the process of a step has been idle in a transaction, as its title reports, ns.
pub(super) fn idle_in_transaction_ns(case: Case<'_>, step: &Step) -> Option<u64> {
    let since_ns = case.view.topology.idle_in_transaction_since_ns(step.tgid)?;
    Some(case.view.window.to_ns.saturating_sub(since_ns))
}
