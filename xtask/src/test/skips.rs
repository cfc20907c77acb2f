//! The skips that are allowed, each with the kind of machine that it is allowed on. Any other skip fails the run: a test
//! that silently stops running is worse than one that fails.

/// A test that cannot run on one kind of machine.
#[derive(Debug)]
pub struct AllowedSkip {
    /// The test's name; `*` at its start or end stands for anything.
    test: &'static str,
    /// Part of the reason that the test must report: it identifies the kind of machine.
    reason: &'static str,
    /// Why it cannot run on that kind of machine, and where it does run.
    #[expect(dead_code, reason = "documentation for readers of the list")]
    because: &'static str,
}

const ALLOWED: &[AllowedSkip] = &[
    AllowedSkip {
        test: "sources: build the kept eBPF object",
        reason: "the eBPF toolchain is Debian's",
        because: "machines that cannot download the nightly: another compiler gives other bytes; compared wherever it is installed",
    },
    AllowedSkip {
        test: "*: recv ktls depth",
        reason: "this kernel has no TLS",
        because: "kernels built without CONFIG_TLS; measured on the kernels of the matrix from 6.1 on",
    },
    AllowedSkip {
        test: "*: send ktls depth",
        reason: "this kernel has no TLS",
        because: "as above",
    },
    AllowedSkip {
        test: "*::a_ktls_connection_has_a_plausible_depth",
        reason: "this kernel has no kTLS",
        because: "as above: the rows of the accuracy table cover it on the kernels of the matrix",
    },
    AllowedSkip {
        test: "this kernel: inflight with loss*",
        reason: "this kernel has no netem",
        because: "kernels built without sch_netem; measured on every kernel of the matrix",
    },
    AllowedSkip {
        test: "this kernel: downstream with loss*",
        reason: "this kernel has no netem",
        because: "as above",
    },
    AllowedSkip {
        test: "*::memory_of_a_file_system_that_never_answers_does_not_hold_up_the_agent",
        reason: "this kernel has no FUSE",
        because: "kernels built without CONFIG_FUSE_FS; `agent/tests/user_memory.rs` covers pages that are not resident",
    },
    AllowedSkip {
        test: "*::a_command_line_that_cannot_be_read_does_not_hold_up_the_agent",
        reason: "this kernel has no FUSE",
        because: "as above; the unit tests of `agent/src/target/process_file.rs` cover slow reads",
    },
    AllowedSkip {
        test: "*::performance_data_on_a_file_system_that_never_answers_is_not_opened",
        reason: "this kernel has no FUSE",
        because: "as above; the unit tests of `agent/src/collect/jvm_counters` cover which file systems are not asked",
    },
    AllowedSkip {
        test: "kernel 6.12-arm64: *",
        reason: "is not installed",
        because: "machines without the emulator or the cross compiler for aarch64; the kernel is booted only if it is named",
    },
    AllowedSkip {
        test: "kernel 6.12-arm64: *",
        reason: "no image of it in",
        because: "machines without access to Debian's archive; as above",
    },
    AllowedSkip {
        test: "*: disk depth",
        reason: "cannot throttle a disk",
        because: "guests of the matrix have no block device; measured on kernels that have one",
    },
    AllowedSkip {
        test: "*: disk oldest",
        reason: "cannot throttle a disk",
        because: "as above",
    },
    AllowedSkip {
        test: "*::io_limits_are_part_of_the_answer_everywhere",
        reason: "no block device behind temporary directories",
        because: "machines whose /tmp is in memory or on an overlay; with TMPDIR on a disk it runs",
    },
    AllowedSkip {
        test: "*::files_mounted_over_a_control_group_neither_block_the_agent_nor_deceive_it",
        reason: "no block device behind temporary directories",
        because: "as above",
    },
    AllowedSkip {
        test: "*::the_memory_limit_of_the_service_is_the_cause_everywhere",
        reason: "no block device behind temporary directories",
        because: "as above",
    },
];

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
    fn a_star_matches_anything_at_either_end() {
        assert!(matches("kernel 5.10: *", "kernel 5.10: recv ktls depth"));
        assert!(matches("*: disk depth", "kernel sid: disk depth"));
        assert!(!matches("disk depth", "kernel sid: disk depth"));
    }
}
