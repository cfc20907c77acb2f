//! Every text in a sample, with what it is: all else are numbers, times and addresses.
#![forbid(unsafe_code)]

use std::net::SocketAddr;

use super::{
    Cgroup, CpuUser, Detail, Holder, Listening, Message, Notice, Peer, Sample, Target, Title, Wait,
};

/// What a text is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Text {
    /// Of a process, an executable, a thread, a service.
    Name,
    /// Of a file, or a unix socket.
    Path,
    /// Of a control group.
    Group,
    Container,
    /// Key and value of a resource attribute.
    Attribute,
    Device,
    /// What a process says of itself.
    Title,
    /// Name of a kind of message.
    Message,
    /// A line of a log.
    Line,
    /// A sentence of the agent's.
    Notice,
}

/// Shows each text to `tell`, which may change it. A field that is new in a sample has to be added here: this does not
/// compile without it.
pub fn each_text(sample: &mut Sample, tell: &mut impl FnMut(Text, &mut String)) {
    let Sample {
        mono_ns: _,
        unix_ns: _,
        targets,
        walks: _,
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
    } = sample;
    for one in targets.iter_mut().flatten() {
        target(one, tell);
    }
    for pipe in pipes {
        each(Text::Path, &mut pipe.path, tell);
    }
    for socket in unix {
        each(Text::Path, &mut socket.path, tell);
        each(Text::Path, &mut socket.peer_path, tell);
    }
    for wait in waits.iter_mut().chain(profile) {
        thread(wait, tell);
    }
    for Cgroup { path, .. } in cgroups {
        tell(Text::Group, path);
    }
    for CpuUser { name, cgroup, .. } in cpu_users {
        tell(Text::Name, name);
        each(Text::Group, cgroup, tell);
    }
    for Listening { name, .. } in listening.iter_mut().flatten() {
        tell(Text::Name, name);
    }
    for Holder { name, .. } in holders.iter_mut().flatten() {
        tell(Text::Name, name);
    }
    for Peer { name, .. } in peers.iter_mut().flatten() {
        tell(Text::Name, name);
    }
    for Title { title, .. } in titles {
        tell(Text::Title, title);
    }
    for one in messages {
        message(one, tell);
    }
    for Notice { code: _, text } in notices {
        tell(Text::Notice, text);
    }
}

fn each(what: Text, texts: &mut Option<String>, tell: &mut impl FnMut(Text, &mut String)) {
    if let Some(text) = texts {
        tell(what, text);
    }
}

fn target(target: &mut Target, tell: &mut impl FnMut(Text, &mut String)) {
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
        followed: _,
    } = target;
    for text in [name, exe, comm] {
        tell(Text::Name, text);
    }
    each(Text::Container, container, tell);
    each(Text::Group, cgroup, tell);
    for (key, value) in attributes {
        tell(Text::Attribute, key);
        tell(Text::Attribute, value);
    }
}

fn thread(wait: &mut Wait, tell: &mut impl FnMut(Text, &mut String)) {
    tell(Text::Name, &mut wait.comm);
    if let Some(syscall) = &mut wait.syscall {
        match &mut syscall.detail {
            Detail::None | Detail::Futex { .. } | Detail::Poll(_) => {}
            Detail::File { path, device } => {
                tell(Text::Path, path);
                each(Text::Device, device, tell);
            }
        }
    }
}

fn message(message: &mut Message, tell: &mut impl FnMut(Text, &mut String)) {
    let Message {
        tgid: _,
        path,
        name,
        count: _,
        line,
        not_before_ns: _,
        not_after_ns: _,
    } = message;
    tell(Text::Path, path);
    tell(Text::Message, name);
    tell(Text::Line, line);
}

/// Shows each network address to `tell`, which may change it.
pub fn each_address(sample: &mut Sample, tell: &mut impl FnMut(&mut SocketAddr)) {
    for listener in &mut sample.listeners {
        tell(&mut listener.address);
    }
    for connection in &mut sample.connections {
        tell(&mut connection.local);
        tell(&mut connection.remote);
    }
    for socket in &mut sample.datagrams {
        tell(&mut socket.local);
        tell(&mut socket.remote);
    }
    for listening in sample.listening.iter_mut().flatten() {
        tell(&mut listening.address);
    }
    for peer in sample.peers.iter_mut().flatten() {
        tell(&mut peer.local);
        tell(&mut peer.remote);
    }
}
