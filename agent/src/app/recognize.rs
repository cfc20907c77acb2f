//! Which preset a process belongs to: by its program, never by its port.

use wildmatch::WildMatch;

use super::table::{At, Find};

/// Maximum number of arguments that are compared. A JVM has a hundred before its class.
const MAX_ARGUMENTS: usize = 512;

/// What a process executes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Program {
    /// Base name of the executable.
    pub exe: String,
    pub argv: Vec<String>,
}

impl Program {
    /// `cmdline`: as in /proc, arguments that end with a zero byte. A process that overwrites its title has only one.
    pub fn new(exe: &str, cmdline: &[u8]) -> Self {
        let argv = cmdline.split(|byte| *byte == 0).take(MAX_ARGUMENTS);
        let argv = argv.map(|argument| String::from_utf8_lossy(argument).into_owned());
        Self {
            exe: base_name(exe).to_owned(),
            argv: argv.filter(|argument| !argument.is_empty()).collect(),
        }
    }

    pub fn is(&self, find: &Find) -> bool {
        let has_arguments = || find.argv.iter().any(|words| self.has_arguments(words));
        self.may_be(find) && (find.argv.is_empty() || has_arguments())
    }

    /// The same, as far as its executable shows.
    pub fn may_be(&self, find: &Find) -> bool {
        let mut names = find.exe.iter();
        find.exe.is_empty() || names.any(|name| WildMatch::new(name).matches(&self.exe))
    }

    /// Whether these words are consecutive arguments, or their base names.
    fn has_arguments(&self, words: &str) -> bool {
        let words: Vec<&str> = words.split_ascii_whitespace().collect();
        !words.is_empty()
            && self.argv.windows(words.len()).any(|arguments| {
                let mut pairs = arguments.iter().zip(&words);
                pairs.all(|(argument, word)| argument == word || base_name(argument) == *word)
            })
    }

    /// The number that one of these options has: `-m 8222`, `--port=8222`.
    pub fn option(&self, names: &[String]) -> Option<u64> {
        let mut arguments = self.argv.iter();
        while let Some(argument) = arguments.next() {
            for name in names {
                let Some(rest) = argument.strip_prefix(name.as_str()) else {
                    continue;
                };
                if rest.is_empty() {
                    return arguments.next()?.parse().ok();
                }
                if let Some(value) = rest.strip_prefix('=') {
                    return value.parse().ok();
                }
            }
        }
        None
    }

    /// The ports at which this process may be asked; empty: any of its own.
    pub fn ports(&self, at: &At) -> Vec<u16> {
        let named = self.option(&at.port_options);
        let named = named.and_then(|port| u16::try_from(port).ok());
        match named {
            Some(port) => vec![port],
            None => at.ports.clone(),
        }
    }
}

fn base_name(path: &str) -> &str {
    path.rsplit('/').next().unwrap_or(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn find(exe: &[&str], argv: &[&str]) -> Find {
        let owned = |texts: &[&str]| texts.iter().map(|text| (*text).to_owned()).collect();
        Find {
            exe: owned(exe),
            argv: owned(argv),
        }
    }

    #[test]
    fn a_process_is_recognized_by_its_program_and_its_arguments() {
        let vllm = Program::new(
            "/usr/bin/python3.12",
            b"python3\0/opt/venv/bin/vllm\0serve\0m\0--port\x009000\0",
        );
        assert!(vllm.is(&find(&[], &["vllm serve"])));
        assert!(vllm.is(&find(&["python3*"], &["vllm serve"])));
        assert!(!vllm.is(&find(&["redis-server"], &["vllm serve"])));
        assert!(!vllm.is(&find(&[], &["serve vllm", "vllm m"])));
        assert!(!vllm.is(&find(&["python"], &[])));
        assert_eq!(vllm.option(&["--port".to_owned()]), Some(9000));
        let empty = Program::new("", b"");
        assert!(!empty.is(&find(&["redis-server"], &[])));
        assert!(!empty.is(&find(&[], &["vllm serve"])));
    }

    #[test]
    fn a_port_comes_from_an_option_or_else_from_the_preset() {
        let at = At {
            ports: vec![8222],
            port_options: vec!["-m".to_owned(), "--http_port".to_owned()],
            ..At::default()
        };
        let ports = |cmdline: &[u8]| Program::new("nats-server", cmdline).ports(&at);
        assert_eq!(ports(b"nats-server\0-m\x009222\0"), [9222]);
        assert_eq!(ports(b"nats-server\0--http_port=9223\0"), [9223]);
        assert_eq!(ports(b"nats-server\0-js\0"), [8222]);
        assert_eq!(ports(b"nats-server\0-m\0many\0"), [8222]);
        assert_eq!(ports(b"nats-server\0-m\x0099999\0"), [8222]);
    }
}
