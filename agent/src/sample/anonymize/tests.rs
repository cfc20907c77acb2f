use std::net::SocketAddr;

use super::*;
use crate::sample::{CpuUser, Holder, Listening, Message, Target, Title};

fn told(what: Text, text: &str) -> String {
    Anonymizer::default().told(what, text)
}

/// A stream of numbers that is the same on every run (xorshift64).
struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    /// Words as people name things, some joined to paths and sentences, among them all that rules and tables know.
    fn text(&mut self, secrets: &mut BTreeSet<String>) -> String {
        let mut text = String::new();
        for _ in 0..1 + self.next() % 5 {
            let known = PROGRAMS.iter().chain(PLACES).chain(TITLES);
            let known: Vec<&&str> = known.chain(&["queue", "full", "/dev/pts/3"]).collect();
            if self.next().is_multiple_of(3) {
                text.push_str(known[(self.next() % known.len() as u64) as usize]);
            } else {
                // No token and no known word has a letter of these.
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
fn no_word_of_the_machine_survives_in_any_text() {
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
            let told = anonymizer.told(what, &text);
            for secret in &secrets {
                assert!(
                    !told.contains(secret),
                    "{what:?} {text:?} is told as {told:?}"
                );
            }
        }
    }
}

#[test]
fn the_same_text_is_the_same_token_and_another_is_another() {
    let mut anonymizer = Anonymizer::default();
    let mut name = |text: &str| anonymizer.told(Text::Name, text);
    let (shop, cart) = (name("shop-api"), name("cart-api"));
    assert_ne!(shop, cart);
    assert_eq!(name("shop-api"), shop);
    assert!(is_token(&shop) && is_token(&cart), "{shop} {cart}");
    assert!(!is_token("shop-api") && !is_token("name-"), "no token");
}

#[test]
fn threads_of_one_pool_stay_alike_and_those_of_two_do_not() {
    let mut anonymizer = Anonymizer::default();
    let mut name = |text: &str| anonymizer.told(Text::Name, text);
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
fn programs_and_places_that_all_the_world_knows_stay() {
    assert_eq!(told(Text::Name, "postgres"), "postgres");
    assert_eq!(told(Text::Name, "python3.11"), "python3.11");
    assert_eq!(
        told(Text::Path, "/var/log/acme/shop.log"),
        "/var/log/path-a/path-b"
    );
    assert_eq!(told(Text::Path, "@acme"), "@path-a");
    assert_eq!(told(Text::Path, "acme.sock"), "path-a");
    assert_eq!(
        told(Text::Group, "/system.slice/acme.service"),
        "/system.slice/group-a"
    );
    assert_eq!(told(Text::Group, "/"), "/");
}

#[test]
fn a_terminal_stays_one() {
    assert_eq!(told(Text::Path, "/dev/pts/12"), "/dev/pts/12");
    assert_eq!(told(Text::Path, "/dev/ttyACME"), "/dev/tty");
    assert_eq!(told(Text::Path, "/dev/console"), "/dev/console");
    assert_eq!(told(Text::Path, "/dev/pts/acme"), "/dev/pts/path-a");
}

#[test]
fn of_a_title_stays_what_the_rules_know() {
    let title = |text| told(Text::Title, text);
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
fn of_a_line_stays_what_the_table_of_messages_knows() {
    let line = "listen queue of socket \"shop:8080\" (fd: 3) full";
    assert_eq!(told(Text::Line, line), "listen queue of … full");
    assert_eq!(
        told(Text::Message, "listen_queue_full"),
        "listen_queue_full"
    );
    assert_eq!(told(Text::Message, "acme_full"), "own-a");
}

#[test]
fn addresses_become_others_and_loopback_stays() {
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
    // The same machine, seen through a socket that serves both families.
    assert_eq!(address("::ffff:203.0.113.9"), "::ffff:10.0.0.1");
}

#[test]
fn processes_at_no_end_of_anything_are_dropped_and_those_that_starve_others_are_not() {
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
    let told = anonymizer.anonymize(&sample);
    let tgids = |cpu_users: &[CpuUser]| cpu_users.iter().map(|one| one.tgid).collect::<Vec<_>>();
    assert_eq!(tgids(&told.cpu_users), [20, 40]);
    assert_eq!(told.listening.unwrap().len(), 1);
    assert_eq!(told.titles, [title(10)]);
    assert!(told.targets.unwrap()[0].attributes.is_empty());
}

#[test]
fn every_text_of_a_sample_is_shown() {
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
