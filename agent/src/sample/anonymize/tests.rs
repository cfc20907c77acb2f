use std::net::SocketAddr;

use super::*;
use crate::sample::{CpuUser, Holder, Listening, Message, Target, Title};

fn replaced(what: Text, text: &str) -> String {
    Anonymizer::default().replace(what, text)
}

/// A deterministic sequence of random numbers (xorshift64).
struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    /// Random words, some joined to paths and sentences, among them all words that the rules and tables know.
    fn text(&mut self, secrets: &mut BTreeSet<String>) -> String {
        let mut text = String::new();
        for _ in 0..1 + self.next() % 5 {
            let known = PROGRAMS.iter().chain(PLACES).chain(TITLES);
            let known: Vec<&&str> = known.chain(&["queue", "full", "/dev/pts/3"]).collect();
            if self.next().is_multiple_of(3) {
                text.push_str(known[(self.next() % known.len() as u64) as usize]);
            } else {
                // No token and no known word has any of these letters.
                let letters = ['q', 'z', 'Q', 'Z', 'ß', '漢', '_'];
                let secret: String = (0..4 + self.next() % 9)
                    .map(|_| letters[(self.next() % letters.len() as u64) as usize])
                    .collect();
                text.push_str(&secret);
                secrets.insert(secret);
            }
            let joints = ["/", " ", "", "-", ":", ".", "7", " : ", "@", "\t"];
            text.push_str(joints[(self.next() % joints.len() as u64) as usize]);
        }
        text
    }
}

#[test]
fn no_identifying_word_survives_in_any_text() {
    let mut numbers = Numbers(0x5eed);
    let mut anonymizer = Anonymizer::default();
    let kinds = [
        Text::Name,
        Text::Path,
        Text::Group,
        Text::Container,
        Text::Attribute,
        Text::Device,
        Text::Title,
        Text::Message,
        Text::Line,
        Text::Notice,
    ];
    for _ in 0..2_000 {
        let mut secrets = BTreeSet::new();
        let text = numbers.text(&mut secrets);
        for what in kinds {
            let replaced = anonymizer.replace(what, &text);
            for secret in &secrets {
                assert!(
                    !replaced.contains(secret),
                    "{what:?} {text:?} is replaced as {replaced:?}"
                );
            }
        }
    }
}

#[test]
fn each_text_has_its_own_token() {
    let mut anonymizer = Anonymizer::default();
    let mut name = |text: &str| anonymizer.replace(Text::Name, text);
    let (shop, cart) = (name("shop-api"), name("cart-api"));
    assert_ne!(shop, cart);
    assert_eq!(name("shop-api"), shop);
    assert!(is_token(&shop) && is_token(&cart), "{shop} {cart}");
    assert!(!is_token("shop-api") && !is_token("name-"), "no token");
}

#[test]
fn threads_of_one_pool_keep_a_common_name_and_those_of_two_pools_do_not() {
    let mut anonymizer = Anonymizer::default();
    let mut name = |text: &str| anonymizer.replace(Text::Name, text);
    let alike = |name: &str| {
        name.trim_end_matches(|c: char| c.is_ascii_digit())
            .to_owned()
    };
    let (one, two) = (name("loader-1"), name("loader-2"));
    assert_ne!(one, two);
    assert_eq!(alike(&one), alike(&two));
    assert_ne!(alike(&one), alike(&name("saver-1")));
    let (one, two) = (name("pool-1-thread-1"), name("pool-1-thread-2"));
    assert_ne!(one, two);
    assert_eq!(alike(&one), alike(&two));
}

#[test]
fn well_known_programs_and_directories_are_kept() {
    assert_eq!(replaced(Text::Name, "postgres"), "postgres");
    assert_eq!(replaced(Text::Name, "python3.11"), "python3.11");
    assert_eq!(
        replaced(Text::Path, "/var/log/acme/shop.log"),
        "/var/log/path-a/path-b"
    );
    assert_eq!(replaced(Text::Path, "@acme"), "@path-a");
    assert_eq!(replaced(Text::Path, "acme.sock"), "path-a");
    assert_eq!(
        replaced(Text::Group, "/system.slice/acme.service"),
        "/system.slice/group-a"
    );
    assert_eq!(replaced(Text::Group, "/"), "/");
}

#[test]
fn a_terminal_is_still_recognizable() {
    assert_eq!(replaced(Text::Path, "/dev/pts/12"), "/dev/pts/12");
    assert_eq!(replaced(Text::Path, "/dev/ttyACME"), "/dev/tty");
    assert_eq!(replaced(Text::Path, "/dev/console"), "/dev/console");
    assert_eq!(replaced(Text::Path, "/dev/pts/acme"), "/dev/pts/path-a");
}

#[test]
fn the_words_of_a_title_that_the_rules_know_are_kept() {
    let title = |text| replaced(Text::Title, text);
    assert_eq!(
        title("postgres: bob shop [local] UPDATE waiting"),
        "postgres: … [local] UPDATE waiting"
    );
    assert_eq!(
        title("postgres: bob shop 10.1.2.3(51234) idle in transaction (aborted)"),
        "postgres: … idle in transaction (aborted)"
    );
    assert_eq!(title("acme-worker --token=s3cret"), "…");
}

#[test]
fn the_words_of_a_log_line_that_the_patterns_know_are_kept() {
    let line = "listen queue of socket \"shop:8080\" (fd: 3) full";
    assert_eq!(replaced(Text::Line, line), "listen queue of … full");
    assert_eq!(
        replaced(Text::Message, "listen_queue_full"),
        "listen_queue_full"
    );
    assert_eq!(replaced(Text::Message, "acme_full"), "own-a");
}

#[test]
fn addresses_are_replaced_except_for_loopback() {
    let mut anonymizer = Anonymizer::default();
    let mut address = |text: &str| {
        let address: IpAddr = text.parse().unwrap();
        anonymizer.address(address).to_string()
    };
    assert_eq!(address("127.0.0.2"), "127.0.0.2");
    assert_eq!(address("::"), "::");
    assert_eq!(address("203.0.113.9"), "10.0.0.1");
    assert_eq!(address("2001:db8::1"), "fd00::2");
    assert_eq!(address("203.0.113.9"), "10.0.0.1");
    // The same host, seen through a dual-stack socket.
    assert_eq!(address("::ffff:203.0.113.9"), "::ffff:10.0.0.1");
}

#[test]
fn unrelated_processes_are_dropped_unless_they_used_cpu() {
    let listening = |tgid, port: u16| Listening {
        netns: 1,
        address: SocketAddr::from(([127, 0, 0, 1], port)),
        tgid,
        name: "shop".to_owned(),
    };
    let cpu_user = |tgid, name: &str, cpu_ns| CpuUser {
        tgid,
        name: name.to_owned(),
        cgroup: None,
        cpu_ns,
    };
    let title = |tgid| Title {
        tgid,
        title: "idle".to_owned(),
    };
    let sample = Sample {
        targets: Some(vec![Target {
            tgids: vec![10],
            attributes: vec![("team".to_owned(), "shop".to_owned())],
            ..Target::default()
        }]),
        holders: Some(vec![Holder {
            inode: 1,
            tgid: 20,
            name: "logger".to_owned(),
            fd: 3,
            reads: true,
            writes: false,
        }]),
        listening: Some(vec![listening(10, 80), listening(30, 90)]),
        cpu_users: vec![
            cpu_user(20, "logger", 1),
            cpu_user(40, "hog", 900_000_000),
            cpu_user(50, "sleeper", 0),
        ],
        titles: vec![title(10), title(30)],
        ..Sample::default()
    };
    let mut anonymizer = Anonymizer::default();
    anonymizer.learn(&sample);
    let replaced = anonymizer.anonymize(&sample);
    let tgids = |cpu_users: &[CpuUser]| cpu_users.iter().map(|one| one.tgid).collect::<Vec<_>>();
    assert_eq!(tgids(&replaced.cpu_users), [20, 40]);
    assert_eq!(replaced.listening.unwrap().len(), 1);
    assert_eq!(replaced.titles, [title(10)]);
    assert!(replaced.targets.unwrap()[0].attributes.is_empty());
}

#[test]
fn every_text_of_a_sample_is_visited() {
    let mut sample = Sample {
        messages: vec![Message {
            tgid: 1,
            path: "/shop/log".to_owned(),
            name: "shop_full".to_owned(),
            count: 1,
            line: "shop is full".to_owned(),
            not_before_ns: 0,
            not_after_ns: 1,
        }],
        cpu_users: vec![CpuUser {
            tgid: 2,
            name: "shop".to_owned(),
            cgroup: Some("/shop".to_owned()),
            cpu_ns: 1,
        }],
        ..Sample::default()
    };
    each_text(&mut sample, &mut |_, text| {
        *text = text.replace("shop", "x");
    });
    let all = serde_json::to_string(&sample).unwrap();
    assert!(!all.contains("shop"), "{all}");
}
