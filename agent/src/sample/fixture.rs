//! Test data: parts of a sample.

use std::net::SocketAddr;

use super::Connection;

/// An established connection that has carried no data.
pub(crate) fn silent_connection() -> Connection {
    Connection {
        cookie: 0,
        tgid: 10,
        fd: 0,
        netns: 1,
        local: SocketAddr::from(([10, 0, 0, 1], 80)),
        remote: SocketAddr::from(([10, 0, 0, 2], 4000)),
        state: 1,
        rcv_nxt: 0,
        copied_seq: 0,
        write_seq: 0,
        snd_una: 0,
        snd_nxt: 0,
        snd_wnd: 0,
        rmem_alloc: 0,
        rcvbuf: 0,
        wmem_queued: 0,
        sndbuf: 0,
        drops: 0,
        snd_wl1: 0,
        segments: 0,
        since_received_ns: 0,
        since_sent_ns: 0,
        since_any_segment_ns: 0,
    }
}
