//! Visits every text in a sample with its type. All other fields are numbers, times and addresses.
#![forbid(unsafe_code)]

use std::net::SocketAddr;

use super::{
    AppAnswer, AppQueue, Cgroup, CpuUser, Detail, Hidden, Holder, HookCost, HookLoss, IoLimit,
    Listening, LockWait, Message, Notice, Peer, Refaults, Sample, SharedLock, Target, Title, Wait,
};

/// The type of a text.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Text {
    /// The name of a process, an executable, a thread or a service.
    Name,
    /// The path of a file or a unix socket.
    Path,
    /// The path of a control group.
    Group,
    Container,
    /// Key and value of a resource attribute.
    Attribute,
    Device,
    /// A process title.
    Title,
    /// The name of a known log message.
    Message,
    /// A line of a log.
    Line,
    /// The text of a notice of the agent.
    Notice,
    /// The name of a preset.
    Preset,
    /// The name of a queue inside a service, or of a value beside it.
    Queue,
}

/// Passes each text to `visit`, which may change it. A new field of a sample must be added here: this does not compile
/// without it.
pub fn each_text(sample: &mut Sample, visit: &mut impl FnMut(Text, &mut String)) {
    let Sample {
        mono_ns: _,
        unix_ns: _,
        targets,
        scans: _,
        listeners: _,
        connections: _,
        pipes,
        datagrams: _,
        unix,
        rings: _,
        files: _,
        threads: _,
        waits,
        networks: _,
        cgroups,
        machine: _,
        cpu_users,
        listening,
        holders,
        profile,
        peers,
        titles,
        messages,
        agent: _,
        notices,
        lock_waits,
        on_accelerator: _,
        local_ports: _,
        conntrack: _,
        io_limits,
        refaults,
        epolls: _,
        hooks,
        hidden,
        architecture: _,
        jvm_counters: _,
        app,
    } = sample;
    for one in targets.iter_mut().flatten() {
        target(one, visit);
    }
    for pipe in pipes {
        each(Text::Path, &mut pipe.path, visit);
    }
    for socket in unix {
        each(Text::Path, &mut socket.path, visit);
        each(Text::Path, &mut socket.peer_path, visit);
    }
    for wait in waits.iter_mut().chain(profile) {
        thread(wait, visit);
    }
    for Cgroup { path, .. } in cgroups {
        visit(Text::Group, path);
    }
    for CpuUser { name, cgroup, .. } in cpu_users {
        visit(Text::Name, name);
        each(Text::Group, cgroup, visit);
    }
    for Listening { name, .. } in listening.iter_mut().flatten() {
        visit(Text::Name, name);
    }
    for Holder { name, .. } in holders.iter_mut().flatten() {
        visit(Text::Name, name);
    }
    for Peer { name, .. } in peers.iter_mut().flatten() {
        visit(Text::Name, name);
    }
    for wait in hooks.iter_mut().flat_map(|report| &mut report.waits) {
        each(Text::Path, &mut wait.path, visit);
        let worst = wait.worst.iter_mut();
        let parties = worst.flat_map(|worst| worst.culprit.iter_mut().chain(&mut worst.waker));
        for party in parties {
            visit(Text::Name, &mut party.comm);
        }
    }
    if let Some(report) = hooks {
        visit(Text::Notice, &mut report.reason);
        // From closed lists, but a recording may contain anything.
        for HookCost { name, .. } in &mut report.hooks {
            visit(Text::Notice, name);
        }
        for HookLoss { reason, .. } in &mut report.lost {
            visit(Text::Notice, reason);
        }
    }
    for Title { title, .. } in titles {
        visit(Text::Title, title);
    }
    for one in messages {
        message(one, visit);
    }
    for Notice { code: _, text } in notices {
        visit(Text::Notice, text);
    }
    for wait in lock_waits.iter_mut().flatten() {
        lock_wait(wait, visit);
    }
    for answer in app {
        app_answer(answer, visit);
    }
    for Refaults { cgroup, .. } in refaults {
        visit(Text::Group, cgroup);
    }
    for Hidden { cgroup, fact: _ } in hidden {
        visit(Text::Group, cgroup);
    }
    for IoLimit { cgroup, device, .. } in io_limits {
        visit(Text::Group, cgroup);
        visit(Text::Device, device);
    }
}

fn each(what: Text, texts: &mut Option<String>, visit: &mut impl FnMut(Text, &mut String)) {
    if let Some(text) = texts {
        visit(what, text);
    }
}

fn target(target: &mut Target, visit: &mut impl FnMut(Text, &mut String)) {
    let Target {
        id: _,
        name,
        pid: _,
        start_ns: _,
        exe,
        comm,
        container,
        cgroup,
        attributes,
        cpus: _,
        tgids: _,
        is_neighbour: _,
        workload: _,
    } = target;
    for text in [name, exe, comm] {
        visit(Text::Name, text);
    }
    each(Text::Container, container, visit);
    each(Text::Group, cgroup, visit);
    for (key, value) in attributes {
        visit(Text::Attribute, key);
        visit(Text::Attribute, value);
    }
}

fn thread(wait: &mut Wait, visit: &mut impl FnMut(Text, &mut String)) {
    visit(Text::Name, &mut wait.comm);
    if let Some(syscall) = &mut wait.syscall {
        match &mut syscall.detail {
            Detail::None | Detail::Futex { .. } | Detail::Poll(_) => {}
            Detail::File { path, device } => {
                visit(Text::Path, path);
                each(Text::Device, device, visit);
            }
        }
    }
}

fn app_answer(answer: &mut AppAnswer, visit: &mut impl FnMut(Text, &mut String)) {
    let AppAnswer {
        tgid: _,
        preset,
        at_ns: _,
        took_ns: _,
        queues,
    } = answer;
    visit(Text::Preset, preset);
    for queue in queues.iter_mut().flatten() {
        let AppQueue {
            name,
            unit: _,
            depth: _,
            limit: _,
            limit_rejects: _,
            serving: _,
            slots: _,
            entered: _,
            left: _,
            lost: _,
            waited_ns: _,
            waits: _,
            oldest_ns: _,
            consumers: _,
            context,
            consumer_tgids: _,
            served_on: _,
        } = queue;
        visit(Text::Queue, name);
        for (measure, _) in context {
            visit(Text::Queue, measure);
        }
    }
}

fn lock_wait(wait: &mut LockWait, visit: &mut impl FnMut(Text, &mut String)) {
    let LockWait {
        tgid: _,
        tid: _,
        voluntary: _,
        id: _,
        lock,
        holder: _,
        holder_name,
    } = wait;
    visit(Text::Name, holder_name);
    match lock {
        SharedLock::File { path, polled: _ } => each(Text::Path, path, visit),
        SharedLock::Memory { address: _ } => {}
    }
}

fn message(message: &mut Message, visit: &mut impl FnMut(Text, &mut String)) {
    let Message {
        tgid: _,
        path,
        name,
        count: _,
        line,
        not_before_ns: _,
        not_after_ns: _,
    } = message;
    visit(Text::Path, path);
    visit(Text::Message, name);
    visit(Text::Line, line);
}

/// Passes each network address to `visit`, which may change it.
pub fn each_address(sample: &mut Sample, visit: &mut impl FnMut(&mut SocketAddr)) {
    for listener in &mut sample.listeners {
        visit(&mut listener.address);
    }
    for connection in &mut sample.connections {
        visit(&mut connection.local);
        visit(&mut connection.remote);
    }
    for socket in &mut sample.datagrams {
        visit(&mut socket.local);
        visit(&mut socket.remote);
    }
    for listening in sample.listening.iter_mut().flatten() {
        visit(&mut listening.address);
    }
    for ports in sample.local_ports.iter_mut().flatten() {
        visit(&mut ports.remote);
    }
    for peer in sample.peers.iter_mut().flatten() {
        visit(&mut peer.local);
        visit(&mut peer.remote);
    }
    let queues = sample.app.iter_mut().flat_map(|answer| &mut answer.queues);
    for queue in queues.flatten() {
        for address in queue.served_on.iter_mut().flatten() {
            visit(address);
        }
    }
}
