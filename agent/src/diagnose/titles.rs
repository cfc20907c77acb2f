//! What a process title reports about its process.
//!
//! Some servers write their state over their command line. This is a fact that the server publishes about itself, like a line
//! of its log. This table is the only place where the diagnosis interprets titles. The title alone decides, whatever the program is
//! called: forks and renamed binaries count, too.

/// The state that a title reports.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum TitleState {
    /// The process waits for a lock that only the server knows, such as a row lock. The kernel sees it asleep in
    /// epoll_wait, as if it were idle.
    WaitsForLock,
    /// The process waits for its client while a transaction is open, and may hold locks.
    IdleInTransaction,
}

/// The end of a title, what it reports, and which server writes it. The end, because names of users and databases come before
/// it and may contain anything.
const PATTERNS: &[(&str, TitleState, &str)] = &[
    (" waiting", TitleState::WaitsForLock, "PostgreSQL"),
    (
        " idle in transaction",
        TitleState::IdleInTransaction,
        "PostgreSQL",
    ),
    (
        " idle in transaction (aborted)",
        TitleState::IdleInTransaction,
        "PostgreSQL",
    ),
];

/// The state that this title reports, if any.
pub(super) fn state(title: &str) -> Option<TitleState> {
    let title = title.trim_end();
    let pattern = PATTERNS.iter().find(|(end, _, _)| title.ends_with(end));
    pattern.map(|(_, state, _)| *state)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_end_of_a_title_counts() {
        let waits = Some(TitleState::WaitsForLock);
        let idle = Some(TitleState::IdleInTransaction);
        for (title, expected) in [
            ("postgres: bob shop [local] UPDATE waiting", waits),
            ("postgres: bob shop [local] UPDATE waiting  ", waits),
            (
                "postgres: main: bob shop 10.0.0.1(4711) idle in transaction",
                idle,
            ),
            (
                "postgres: bob shop [local] idle in transaction (aborted)",
                idle,
            ),
            ("postgres: bob waiting [local] UPDATE", None),
            ("postgres: idle in transaction shop [local] SELECT", None),
            ("postgres: bob shop [local] idle", None),
            ("nginx: worker process", None),
            ("waiting", None),
            ("", None),
        ] {
            assert_eq!(state(title), expected, "{title:?}");
        }
    }

    #[test]
    fn the_documentation_lists_every_pattern() {
        let page = concat!(
            env!("CARGO_MANIFEST_DIR"),
            "/../docs/reference/causes/lock_contention.md"
        );
        let page = std::fs::read_to_string(page).unwrap();
        let rows: Vec<&str> = page
            .lines()
            .filter(|line| line.starts_with("| `… "))
            .collect();
        let expected: Vec<String> = PATTERNS
            .iter()
            .map(|(end, state, server)| {
                let meaning = match state {
                    TitleState::WaitsForLock => "waits for a row lock",
                    TitleState::IdleInTransaction => "idle in an open transaction",
                };
                format!("| `…{end}` | {meaning} | {server} |")
            })
            .collect();
        assert_eq!(rows, expected);
    }
}
