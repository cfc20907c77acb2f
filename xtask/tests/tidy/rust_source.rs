//! A small reader of Rust sources: which paths a file names, outside its tests.
//!
//! It knows comments, literals, `use` trees and `#[cfg(test)]`; that is enough for paths, and needs no parser.

use std::{
    fs,
    path::{Path, PathBuf},
};

/// One source file of a crate.
pub struct Source {
    /// Relative to the crate's `src`, for messages.
    pub file: String,
    /// `["diagnose", "rules"]` for `diagnose/rules.rs` and `diagnose/rules/mod.rs`; empty for the crate's root.
    pub module: Vec<String>,
    pub text: String,
}

/// A path that a file names, resolved: `crate` or the name of a crate first.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Named {
    pub line: usize,
    pub path: Vec<String>,
    /// `path!(…)`: a macro is called.
    pub is_macro: bool,
}

impl Source {
    /// A file under `src` whose text is `text`.
    pub fn new(file: &str, text: &str) -> Self {
        let mut module: Vec<String> = file
            .trim_end_matches(".rs")
            .split('/')
            .map(str::to_owned)
            .collect();
        if matches!(
            module.last().map(String::as_str),
            Some("mod" | "lib" | "main")
        ) {
            module.pop();
        }
        Self {
            file: file.to_owned(),
            module,
            text: text.to_owned(),
        }
    }

    /// Tests are free to name anything: `tests.rs`, `tests/`, and the fixtures that only tests compile.
    pub fn is_test(&self) -> bool {
        self.file
            .trim_end_matches(".rs")
            .split('/')
            .any(|part| matches!(part, "tests" | "fixture"))
    }

    /// Every path in the file with more than one segment, imports included, without the code under `#[cfg(test)]`.
    pub fn paths(&self) -> Vec<Named> {
        let tokens = without_tests(&tokens(&self.text));
        let mut found = Vec::new();
        let mut at = 0;
        while at < tokens.len() {
            let is_import =
                tokens[at].is("use") && tokens.get(at + 1).is_some_and(|next| !next.is("<"));
            if is_import {
                at = self.import(&tokens, at + 1, &[], &mut found);
            } else if tokens[at].is_name() && !(at > 0 && tokens[at - 1].is("::")) {
                at = self.expression(&tokens, at, &mut found);
            } else {
                at += 1;
            }
        }
        found
    }

    /// One branch of a `use` tree, below `prefix`; returns where the branch ends.
    fn import(
        &self,
        tokens: &[Token],
        mut at: usize,
        prefix: &[String],
        found: &mut Vec<Named>,
    ) -> usize {
        let line = tokens.get(at).map_or(0, |token| token.line);
        let mut path = prefix.to_vec();
        while let Some(token) = tokens.get(at) {
            if token.is("{") {
                at += 1;
                while tokens.get(at).is_some_and(|token| !token.is("}")) {
                    at = self.import(tokens, at, &path, found);
                    if tokens.get(at).is_some_and(|token| token.is(",")) {
                        at += 1;
                    }
                }
                return at + 1;
            }
            if token.is("as") {
                at += 2;
            } else if token.is("::") {
                at += 1;
            } else if token.is_name() || token.is("*") {
                // `a::{self}` names `a`.
                let names_parent = token.is("self") && !path.is_empty();
                if !names_parent && !token.is("*") {
                    path.push(token.text.clone());
                }
                at += 1;
            } else {
                break;
            }
        }
        found.push(Named {
            line,
            path: self.resolved(path),
            is_macro: false,
        });
        at
    }

    fn expression(&self, tokens: &[Token], mut at: usize, found: &mut Vec<Named>) -> usize {
        let line = tokens[at].line;
        let mut path = vec![tokens[at].text.clone()];
        at += 1;
        while tokens.get(at).is_some_and(|token| token.is("::"))
            && tokens.get(at + 1).is_some_and(Token::is_name)
        {
            path.push(tokens[at + 1].text.clone());
            at += 2;
        }
        let is_macro = tokens.get(at).is_some_and(|token| token.is("!"))
            && tokens.get(at + 1).is_some_and(|token| token.is("("));
        if path.len() > 1 || is_macro {
            found.push(Named {
                line,
                path: self.resolved(path),
                is_macro,
            });
        }
        at
    }

    /// `super` and `self` replaced by the module that they mean.
    fn resolved(&self, path: Vec<String>) -> Vec<String> {
        let is_relative = |name: &String| name == "self" || name == "super";
        if !path.first().is_some_and(is_relative) {
            return path;
        }
        let mut module = self.module.clone();
        let mut rest = path.into_iter().peekable();
        while let Some(name) = rest.next_if(is_relative) {
            if name == "super" {
                module.pop();
            }
        }
        ["crate".to_owned()]
            .into_iter()
            .chain(module)
            .chain(rest)
            .collect()
    }
}

/// All Rust files under `directory`, in order.
pub fn sources(directory: &Path) -> Vec<Source> {
    fn walk(directory: &Path, files: &mut Vec<PathBuf>) {
        for entry in fs::read_dir(directory).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                walk(&path, files);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                files.push(path);
            }
        }
    }
    let mut files = Vec::new();
    walk(directory, &mut files);
    files.sort();
    files
        .iter()
        .map(|path| {
            let file = path.strip_prefix(directory).unwrap();
            Source::new(file.to_str().unwrap(), &fs::read_to_string(path).unwrap())
        })
        .collect()
}

#[derive(Clone, Debug)]
struct Token {
    text: String,
    line: usize,
}

impl Token {
    fn is(&self, text: &str) -> bool {
        self.text == text
    }

    fn is_name(&self) -> bool {
        self.text
            .starts_with(|letter: char| letter.is_alphabetic() || letter == '_')
            && !self.is("as")
    }
}

/// Names and punctuation (`::` is one token); comments, literals and lifetimes are left out.
fn tokens(text: &str) -> Vec<Token> {
    let letters: Vec<char> = text.chars().collect();
    let get = |at: usize| letters.get(at).copied().unwrap_or('\0');
    let is_name = |letter: char| letter.is_alphanumeric() || letter == '_';
    let (mut at, mut line) = (0, 1);
    let mut tokens = Vec::new();
    while at < letters.len() {
        let begin = at;
        let mut token = None;
        match get(at) {
            '/' if get(at + 1) == '/' => {
                while at < letters.len() && get(at) != '\n' {
                    at += 1;
                }
            }
            '/' if get(at + 1) == '*' => {
                let mut depth = 0;
                loop {
                    match (get(at), get(at + 1)) {
                        ('/', '*') => (depth, at) = (depth + 1, at + 2),
                        ('*', '/') => (depth, at) = (depth - 1, at + 2),
                        _ => at += 1,
                    }
                    if depth == 0 || at >= letters.len() {
                        break;
                    }
                }
            }
            'r' | 'b' | 'c' if is_raw_string(&letters[at..]) => at = after_raw_string(&letters, at),
            '"' => at = after_string(&letters, at),
            // A lifetime has no closing quote.
            '\'' if get(at + 1) == '\\' || get(at + 2) == '\'' => {
                at += if get(at + 1) == '\\' { 3 } else { 2 };
                while at < letters.len() && get(at) != '\'' {
                    at += 1;
                }
                at += 1;
            }
            '\'' => {
                at += 1;
                while is_name(get(at)) {
                    at += 1;
                }
            }
            letter if is_name(letter) => {
                while is_name(get(at)) {
                    at += 1;
                }
                token = Some(letters[begin..at].iter().collect());
            }
            ':' if get(at + 1) == ':' => {
                at += 2;
                token = Some("::".to_owned());
            }
            letter => {
                at += 1;
                token = (!letter.is_whitespace()).then(|| letter.to_string());
            }
        }
        tokens.extend(token.map(|text| Token { text, line }));
        line += letters[begin..at.min(letters.len())]
            .iter()
            .filter(|letter| **letter == '\n')
            .count();
    }
    tokens
}

/// `r"`, `r#"`, `br"`, `cr#"` and so on.
fn is_raw_string(letters: &[char]) -> bool {
    let (['b' | 'c', 'r', rest @ ..] | ['r', rest @ ..]) = letters else {
        return false;
    };
    rest.iter().find(|letter| **letter != '#') == Some(&'"')
}

fn after_raw_string(letters: &[char], mut at: usize) -> usize {
    while letters[at] != '#' && letters[at] != '"' {
        at += 1;
    }
    let hashes = letters[at..]
        .iter()
        .take_while(|letter| **letter == '#')
        .count();
    at += hashes + 1;
    while at < letters.len() {
        let closes = letters[at] == '"'
            && letters[at + 1..]
                .iter()
                .take(hashes)
                .filter(|letter| **letter == '#')
                .count()
                == hashes;
        at += 1;
        if closes {
            return at + hashes;
        }
    }
    at
}

fn after_string(letters: &[char], mut at: usize) -> usize {
    at += 1;
    while at < letters.len() && letters[at] != '"' {
        at += if letters[at] == '\\' { 2 } else { 1 };
    }
    at + 1
}

/// The tokens without the items under `#[cfg(test)]`.
fn without_tests(tokens: &[Token]) -> Vec<Token> {
    const TEST: [&str; 7] = ["#", "[", "cfg", "(", "test", ")", "]"];
    let mut kept = Vec::new();
    let mut at = 0;
    while at < tokens.len() {
        let rest = &tokens[at..];
        if rest.len() >= TEST.len() && rest.iter().zip(TEST).all(|(token, text)| token.is(text)) {
            at = after_item(tokens, at + TEST.len());
        } else {
            kept.push(tokens[at].clone());
            at += 1;
        }
    }
    kept
}

/// Where the item that begins here ends: at its `;`, or at the end of its braces.
fn after_item(tokens: &[Token], mut at: usize) -> usize {
    let mut depth = 0_u32;
    while at < tokens.len() {
        match tokens[at].text.as_str() {
            "{" | "(" | "[" => depth += 1,
            ")" | "]" => depth = depth.saturating_sub(1),
            "}" => {
                depth = depth.saturating_sub(1);
                if depth == 0 {
                    return at + 1;
                }
            }
            ";" if depth == 0 => return at + 1,
            _ => {}
        }
        at += 1;
    }
    at
}

#[cfg(test)]
mod tests {
    use super::*;

    fn paths(file: &str, text: &str) -> Vec<String> {
        let named = Source::new(file, text).paths();
        named.iter().map(|named| named.path.join("::")).collect()
    }

    #[test]
    fn trees_of_imports_are_read_whole() {
        let text = "use crate::{\n    queue::{Kind, sub::{self, Deep as D}},\n    sample,\n};\nuse std::fs::*;\nuse super::super::detect::Gauge;";
        assert_eq!(
            paths("diagnose/rules/pool.rs", text),
            [
                "crate::queue::Kind",
                "crate::queue::sub",
                "crate::queue::sub::Deep",
                "crate::sample",
                "std::fs",
                "crate::diagnose::detect::Gauge",
            ]
        );
    }

    #[test]
    fn paths_in_code_are_read_and_those_in_comments_literals_and_tests_are_not() {
        let text = r##"
            // crate::a::B
            /* crate::b /* nested */ crate::c */
            const TEXT: &str = "crate::d \" crate::e";
            const RAW: &str = r#"crate::f " crate::g"#;
            fn f<'a>(x: &'a str) -> char { crate::h::call(x); if x == 'x' { '"' } else { '\'' } }
            #[cfg(test)]
            #[path = "x/tests.rs"]
            mod tests { fn g() { crate::i::call() } }
            #[cfg(test)]
            use crate::j::K;
            fn after() { println!("{}", std::time::Instant::now()) }
        "##;
        let found = paths("a.rs", text);
        assert_eq!(
            found,
            ["crate::h::call", "println", "std::time::Instant::now"]
        );
    }

    #[test]
    fn a_path_has_the_line_it_is_on() {
        let named = Source::new("a.rs", "\n\nuse crate::{\n    b,\n    c,\n};").paths();
        let lines: Vec<usize> = named.iter().map(|named| named.line).collect();
        assert_eq!(lines, [4, 5]);
    }
}
