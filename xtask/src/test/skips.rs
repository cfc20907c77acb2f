//! The skips that are allowed, each with the kind of machine that it is allowed on. Any other skip fails the run: a test
//! that silently stops running is worse than one that fails.

/// A test that cannot run on some machines.
#[derive(Debug)]
pub struct AllowedSkip {
    /// The test's name; `*` at its start or end stands for anything.
    test: &'static str,
    /// Part of the reason that the test must report.
    reason: &'static str,
    /// Why it cannot run there, and where it does run.
    #[expect(dead_code, reason = "for whoever reads or extends the list")]
    because: &'static str,
}

const ALLOWED: &[AllowedSkip] = &[];

/// The entry that allows this skip.
pub fn allowed(test: &str, reason: &str) -> Option<&'static AllowedSkip> {
    ALLOWED
        .iter()
        .find(|skip| matches(skip.test, test) && reason.contains(skip.reason))
}

fn matches(pattern: &str, name: &str) -> bool {
    match (pattern.strip_prefix('*'), pattern.strip_suffix('*')) {
        (Some(end), _) => name.ends_with(end),
        (None, Some(start)) => name.starts_with(start),
        (None, None) => name == pattern,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_allows_one_test_for_one_reason() {
        for skip in ALLOWED {
            let name = skip.test.trim_matches('*');
            assert!(allowed(skip.test, skip.reason).is_some() || skip.test.contains('*'));
            assert!(!name.is_empty() && !skip.reason.is_empty(), "{skip:?}");
        }
        assert!(allowed("no such test", "no reason").is_none());
    }

    #[test]
    fn a_star_stands_for_anything_at_one_end() {
        assert!(matches("kernel 5.10: *", "kernel 5.10: recv ktls depth"));
        assert!(matches("*: disk depth", "kernel sid: disk depth"));
        assert!(!matches("disk depth", "kernel sid: disk depth"));
    }
}
