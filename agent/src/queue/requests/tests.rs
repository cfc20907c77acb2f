//! Tests the rule against a simulated connection whose true state is known, and against scripted connections.

mod talk;
mod tcp;

use talk::{Style, Talk};
use tcp::{CLIENT, Net, SERVER, Tcp};

use super::*;

/// How the rule did over one conversation.
#[derive(Clone, Copy, Debug, Default)]
struct Score {
    samples: u64,
    waited: u64,
    wrong: u64,
    unknown: u64,
    push: u64,
    begun: u64,
    answered: u64,
    age_error_us: u64,
}

/// Samples a connection every `every_us` for a minute, after skipping the first `skip_us`.
fn watch(style: Style, end: usize, every_us: u64, skip_us: u64, seed: u64) -> Score {
    let role = if end == SERVER {
        Role::Accepted
    } else {
        Role::Opened
    };
    let mut talk = Talk::new(style, seed);
    let start_us = talk.tcp.now_us + skip_us;
    let mut score = Score::default();
    talk.run_to(start_us);
    let before = talk.observe(end).1;
    let mut conversation: Option<Conversation> = None;
    let mut at_us = start_us;
    while at_us < start_us + 10_000_000 {
        talk.run_to(at_us);
        let now_ns = at_us * 1_000;
        let (connection, truth) = talk.observe(end);
        let seen = match &mut conversation {
            Some(known) => known.observe(&connection, None, now_ns),
            None => {
                let fresh = skip_us == 0;
                let (known, seen) = Conversation::first(&connection, role, fresh, now_ns);
                conversation = Some(known);
                seen
            }
        };
        score.samples += 1;
        score.begun += u64::from(seen.begun);
        score.answered += u64::from(seen.answered);
        // Lower bounds. A request that was pending at the first sample may be answered.
        let was = u64::from(before.waits);
        assert!(
            score.begun <= truth.begun - before.begun + was,
            "{seen:?} {truth:?} {score:?}"
        );
        assert!(
            score.answered <= truth.answered - before.answered + 1,
            "{seen:?} {truth:?}"
        );
        match seen.status {
            Status::Unknown => score.unknown += 1,
            Status::Push => score.push += 1,
            status if status.is_pending() != truth.waits => {
                score.wrong += 1;
            }
            status => {
                if truth.waits {
                    score.waited += 1;
                    let began_us = seen.began_ns / 1_000;
                    score.age_error_us = score.age_error_us.max(began_us.abs_diff(truth.began_us));
                }
                let is_exact = matches!(status, Status::Unread | Status::Working);
                if is_exact && style.net.loss == 0 && style.request < 1_000 {
                    assert_eq!(status == Status::Unread, truth.unread);
                }
            }
        }
        at_us += every_us;
    }
    score
}

/// Both ends, several sampling intervals, several conversations.
fn watch_all(name: &str, style: Style, skip_us: u64) -> Score {
    let mut sum = Score::default();
    for end in [SERVER, CLIENT] {
        for every_us in [9_700, 23_000, 101_000, 2_100_000] {
            for seed in 1..=3 {
                let one = watch(style, end, every_us, skip_us, seed * 7919);
                sum.samples += one.samples;
                sum.waited += one.waited;
                sum.wrong += one.wrong;
                sum.unknown += one.unknown;
                sum.push += one.push;
                sum.age_error_us = sum.age_error_us.max(one.age_error_us);
            }
        }
    }
    println!("{name}: {sum:?}");
    sum
}

fn probed() -> Style {
    Style {
        net: Net {
            probe_us: 1_000_000,
            ..Style::default().net
        },
        think_us: 2_500_000,
        work_us: 2_500_000,
        ..Style::default()
    }
}

fn far(loss: u64, bytes: u32) -> Style {
    Style {
        net: Net {
            delay_us: 20_000,
            jitter_us: 10_000,
            loss,
            ..Style::default().net
        },
        request: bytes,
        answer: bytes,
        ..Style::default()
    }
}

/// From the start of the connection, and from its middle. Returns both sums.
fn watch_both(name: &str, style: Style) -> [Score; 2] {
    let sums = [0, 7_777_777].map(|skip_us| watch_all(name, style, skip_us));
    for sum in &sums {
        assert_eq!((sum.wrong, sum.push), (0, 0), "{name}: {sum:?}");
        assert!(sum.waited > 500, "{name}: {sum:?}");
    }
    assert_eq!(sums[0].unknown, 0, "{name}: {sums:?}");
    sums
}

/// Ages are accurate to a timer tick plus the time between the parts of a message.
fn assert_age_error_below(us: u64, sums: [Score; 2]) {
    let worst = sums.map(|sum| sum.age_error_us).into_iter().max();
    assert!(worst <= Some(us), "{sums:?}");
}

#[test]
fn sequential_requests_have_the_right_status_at_every_sample() {
    assert_age_error_below(4_000, watch_both("usual", Style::default()));
    let no_delayed_ack = Net {
        delayed_ack_us: 0,
        ..Style::default().net
    };
    let style = Style {
        net: no_delayed_ack,
        ..Style::default()
    };
    assert_age_error_below(4_000, watch_both("no delayed ack", style));
}

#[test]
fn a_closed_loop_without_pauses_has_the_right_status() {
    let style = Style {
        think_us: 0,
        work_us: 10_000,
        ..Style::default()
    };
    assert_age_error_below(4_000, [watch_all("quick", style, 0); 2]);
}

#[test]
fn large_bodies_and_streamed_answers_have_the_right_status() {
    let large = Style {
        request: 150_000,
        answer: 400_000,
        ..Style::default()
    };
    watch_both("large", large);
    let streamed = Style {
        pieces: 10,
        gap_us: 200_000,
        ..Style::default()
    };
    let sum = watch_all("streamed", streamed, 0);
    assert_eq!((sum.wrong, sum.unknown, sum.push), (0, 0, 0), "{sum:?}");
}

#[test]
fn a_greeting_of_the_server_is_not_a_request() {
    let style = Style {
        greeting: 80,
        ..Style::default()
    };
    watch_both("greeting", style);
    let mut tcp = Tcp::new(style.net, style.starts, 1);
    tcp.write(SERVER, 80);
    tcp.run_to(tcp.now_us + 5_000_000);
    for (end, role) in [(CLIENT, Role::Opened), (SERVER, Role::Accepted)] {
        let seen = Conversation::first(&tcp.observe(end), role, true, tcp.now_us * 1_000).1;
        assert_eq!(seen.status, Status::Idle);
    }
}

#[test]
fn keep_alive_probes_change_nothing() {
    assert_age_error_below(4_000, watch_both("probes", probed()));
}

#[test]
fn unread_requests_are_distinguished_from_those_in_work() {
    let style = Style {
        unread_us: 500_000,
        ..Style::default()
    };
    watch_both("unread", style);
}

#[test]
fn the_status_is_right_under_loss_and_reordering() {
    watch_both("far", far(0, 1_000));
    watch_both("far, large", far(0, 50_000));
    watch_both("lossy", far(50, 700));
    // An answer whose head was lost and whose later parts are here counts as begun: the model says that it has not.
    let sum = watch_all("lossy, large", far(50, 50_000), 7_777_777);
    assert!(sum.wrong * 1_000 <= sum.waited, "{sum:?}");
}

/// A scripted accepted connection, sampled every 100 ms.
struct ScriptedConnection {
    tcp: Tcp,
    at: usize,
    conversation: Conversation,
    usual_bytes: Option<u32>,
}

impl ScriptedConnection {
    fn new(at: usize) -> Self {
        let style = Style::default();
        let tcp = Tcp::new(style.net, style.starts, 3);
        let role = if at == SERVER {
            Role::Accepted
        } else {
            Role::Opened
        };
        let (conversation, seen) =
            Conversation::first(&tcp.observe(at), role, true, tcp.now_us * 1_000);
        assert_eq!(seen.status, Status::Idle);
        Self {
            tcp,
            at,
            conversation,
            usual_bytes: None,
        }
    }

    fn after(&mut self, ms: u64) -> Seen {
        self.tcp.run_to(self.tcp.now_us + ms * 1_000);
        let connection = self.tcp.observe(self.at);
        self.conversation
            .observe(&connection, self.usual_bytes, self.tcp.now_us * 1_000)
    }

    fn ask(&mut self, bytes: u32) {
        self.tcp.write(CLIENT, bytes);
        self.tcp.run_to(self.tcp.now_us + 1_000);
        self.tcp.read(SERVER);
    }
}

#[test]
fn a_request_waits_until_the_answer_and_both_are_counted_and_timed() {
    let mut scripted = ScriptedConnection::new(SERVER);
    scripted.tcp.write(CLIENT, 100);
    let seen = scripted.after(100);
    assert_eq!((seen.status, seen.begun), (Status::Unread, 1));
    scripted.tcp.read(SERVER);
    let seen = scripted.after(100);
    assert_eq!((seen.status, seen.begun), (Status::Working, 0));
    scripted.tcp.write(SERVER, 100);
    let seen = scripted.after(100);
    assert_eq!((seen.status, seen.answered), (Status::Sending, 1));
    assert!(seen.took_ns.unwrap().abs_diff(200_000_000) <= 8_000_000);
    assert_eq!(scripted.after(100).status, Status::Idle);
}

#[test]
fn several_requests_between_two_samples_count_as_at_least_one() {
    let mut scripted = ScriptedConnection::new(SERVER);
    for _ in 0..5 {
        scripted.ask(100);
        scripted.tcp.write(SERVER, 200);
        scripted.tcp.run_to(scripted.tcp.now_us + 10_000);
    }
    let seen = scripted.after(1);
    assert_eq!((seen.begun, seen.answered, seen.at_least), (1, 1, true));
}

#[test]
fn an_interim_answer_ends_no_request() {
    // A ping of HTTP/2: the server sends it when a request arrives, and the client acknowledges it with data.
    for (usual_bytes, answered) in [(None, 1), (Some(100), 0)] {
        let mut scripted = ScriptedConnection::new(SERVER);
        scripted.usual_bytes = usual_bytes;
        scripted.ask(150);
        let asked = scripted.after(100);
        scripted.tcp.write(SERVER, 30);
        scripted.tcp.run_to(scripted.tcp.now_us + 10_000);
        scripted.ask(17);
        let seen = scripted.after(100);
        assert_eq!(
            (seen.status, seen.answered, seen.responses),
            (Status::Working, answered, u32::from(answered))
        );
        assert_eq!(seen.began_ns == asked.began_ns, usual_bytes.is_some());
        scripted.tcp.write(SERVER, 70);
        let seen = scripted.after(100);
        assert_eq!((seen.answered, seen.answer_bytes), (1, 70));
    }
}

#[test]
fn pipelined_requests_count_once() {
    let mut scripted = ScriptedConnection::new(SERVER);
    for _ in 0..3 {
        scripted.ask(100);
    }
    let seen = scripted.after(100);
    assert_eq!((seen.status, seen.begun), (Status::Working, 1));
}

#[test]
fn a_client_that_has_shut_down_still_waits_for_its_answer() {
    for together in [true, false] {
        let mut scripted = ScriptedConnection::new(SERVER);
        scripted.ask(100);
        if !together {
            assert_eq!(scripted.after(100).status, Status::Working);
        }
        scripted.tcp.shut_down(CLIENT);
        assert_eq!(scripted.after(100).status, Status::Working);
        scripted.tcp.write(SERVER, 100);
        assert_eq!(scripted.after(100).status, Status::Sending);
        assert_eq!(scripted.after(500).status, Status::Idle);
    }
}

#[test]
fn a_fin_is_not_a_request_and_its_ack_is_not_an_answer() {
    let mut served = ScriptedConnection::new(SERVER);
    served.ask(100);
    served.tcp.write(SERVER, 100);
    assert_eq!(served.after(100).answered, 1);
    served.tcp.shut_down(CLIENT);
    let seen = served.after(100);
    assert_eq!((seen.status, seen.begun), (Status::Idle, 0));

    let mut opened = ScriptedConnection::new(CLIENT);
    opened.ask(100);
    opened.tcp.shut_down(CLIENT);
    assert_eq!(opened.after(100).status, Status::Outstanding);
    opened.tcp.shut_down(SERVER);
    let seen = opened.after(100);
    assert_eq!((seen.status, seen.lost), (Status::Idle, true));
}

#[test]
fn a_reset_during_a_request_is_a_loss_and_a_reset_of_an_idle_connection_is_not() {
    for asks in [true, false] {
        let mut scripted = ScriptedConnection::new(SERVER);
        if asks {
            scripted.ask(100);
        }
        scripted.after(100);
        let mut connection = scripted.tcp.observe(SERVER);
        connection.state = state::CLOSE;
        let seen = scripted
            .conversation
            .observe(&connection, None, scripted.tcp.now_us * 1_000);
        assert_eq!((seen.status, seen.lost), (Status::Closed, asks));
    }
}

#[test]
fn one_way_messages_are_excluded_at_both_ends() {
    for end in [SERVER, CLIENT] {
        let mut scripted = ScriptedConnection::new(end);
        // A greeting and its answer, as MQTT has them.
        scripted.ask(30);
        scripted.tcp.write(SERVER, 4);
        scripted.after(100);
        for _ in 0..12 {
            scripted.ask(50);
            for _ in 0..5 {
                scripted.after(100);
            }
        }
        let seen = scripted.after(100);
        assert_eq!((seen.status, seen.begun), (Status::Push, 0));
    }
}

#[test]
fn a_one_way_stream_is_excluded() {
    let mut scripted = ScriptedConnection::new(SERVER);
    for _ in 0..120 {
        scripted.ask(5_000);
        scripted.after(100);
    }
    assert_eq!(scripted.after(1).status, Status::Push);
}

#[test]
fn a_long_upload_is_a_request_if_requests_are_answered() {
    let mut scripted = ScriptedConnection::new(SERVER);
    for _ in 0..5 {
        scripted.ask(100);
        scripted.after(100);
        scripted.tcp.write(SERVER, 100);
        scripted.after(100);
    }
    for _ in 0..300 {
        scripted.ask(5_000);
        assert_eq!(scripted.after(100).status, Status::Working);
    }
}

#[test]
fn events_pushed_by_a_server_are_one_way() {
    let mut scripted = ScriptedConnection::new(SERVER);
    for _ in 0..20 {
        scripted.tcp.write(SERVER, 100);
        scripted.after(300);
    }
    assert_eq!(scripted.after(1_000).status, Status::Push);
    // Until the first request.
    scripted.ask(100);
    assert_eq!(scripted.after(100).status, Status::Working);
}

#[test]
fn after_a_keepalive_probe_timestamps_decide_the_first_sample_and_a_tie_is_unknown() {
    let scripted = ScriptedConnection::new(CLIENT);
    let mut connection = scripted.tcp.observe(CLIENT);
    let mut first = |received_ms: u64, sent_ms: u64, any_segment_ms: u64| {
        let ns = |ms: u64| ms * 1_000_000;
        connection.snd_wl1 = connection.rcv_nxt;
        connection.since_received_ns = ns(received_ms);
        connection.since_sent_ns = ns(sent_ms);
        connection.since_any_segment_ns = ns(any_segment_ms);
        Conversation::first(&connection, Role::Opened, false, 1 << 50)
            .1
            .status
    };
    assert_eq!(first(30_000, 30_000, 1_000), Status::Unknown);
    assert_eq!(first(30_000, 30_200, 1_000), Status::Idle);
    assert_eq!(first(30_200, 30_000, 1_000), Status::Outstanding);
    assert_eq!(first(300, 300, 300), Status::Outstanding);
    // The kernel says nothing.
    assert_eq!(first(0, 0, 0), Status::Unknown);
}

#[test]
fn requests_between_two_samples_are_counted_by_segments() {
    // 7 came and 9 went: no more than 7 exchanges.
    assert_eq!(exchanges(5 | 3 << 16, 12 | 12 << 16), 7);
    // One upload of 40 segments, one answer; either half may wrap.
    assert_eq!(exchanges(0xfff0 | 0xffff << 16, 0x18), 1);
    assert_eq!(exchanges(7, 7), 0, "a kernel that does not say");
}
