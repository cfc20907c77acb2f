//! Why the eBPF programs cannot be loaded.

use std::{error::Error, fmt, io};

use aya::programs::ProgramError;

use super::{layout::Missing, scanner::BTF_PATH};

/// Any other error, with its causes.
type Cause = Box<dyn Error + Send + Sync>;

/// Why the eBPF programs cannot be loaded, by what the user can do about it.
#[derive(Debug)]
pub enum LoadError {
    /// The kernel's BTF cannot be read: most likely the kernel was built without it.
    NoBtf(io::Error),
    /// The file is not BTF that this version understands.
    BadBtf(Cause),
    /// The kernel's types lack a field without which nothing can be watched.
    MissingField(Missing),
    /// A program calls a BPF helper that this kernel does not have.
    KernelTooOld {
        /// The program.
        program: &'static str,
    },
    /// `bpf(2)` is not permitted.
    Denied {
        /// What was attempted.
        attempted: String,
        /// `EPERM` or `EACCES`.
        source: io::Error,
    },
    /// The verifier rejected a program.
    Rejected {
        /// The program.
        program: &'static str,
        /// The verifier's log; its end has the reason.
        log: String,
    },
    /// Anything else.
    Failed {
        /// What was attempted.
        attempted: String,
        /// Why it failed.
        source: Cause,
    },
}

impl LoadError {
    /// Classifies an error by the `errno` among its causes.
    pub(super) fn new(attempted: impl Into<String>, error: impl Into<Cause>) -> Self {
        let (attempted, source) = (attempted.into(), error.into());
        match denial(source.as_ref()) {
            Some(errno) => Self::Denied {
                attempted,
                source: io::Error::from_raw_os_error(errno),
            },
            None => Self::Failed { attempted, source },
        }
    }

    /// Classifies why `BPF_PROG_LOAD` failed. `EACCES` with a verifier log is a rejection, without one a denial.
    pub(super) fn of_program(program: &'static str, error: ProgramError) -> Self {
        let log = match &error {
            ProgramError::LoadError { verifier_log, .. } => verifier_log.to_string(),
            _ => String::new(),
        };
        if log.trim().is_empty() {
            return Self::new(format!("cannot load the eBPF program {program}"), error);
        }
        Self::of_verdict(program, log)
    }

    /// Classifies a non-empty verifier log.
    fn of_verdict(program: &'static str, log: String) -> Self {
        // The kernel reports an unknown helper as EINVAL, like much else: only the log distinguishes them (check_helper_call,
        // kernel/bpf/verifier.c).
        if log.contains("invalid func unknown#") {
            return Self::KernelTooOld { program };
        }
        Self::Rejected { program, log }
    }
}

/// `EPERM` or `EACCES`, if one of them is the cause.
fn denial(error: &(dyn Error + 'static)) -> Option<i32> {
    let mut causes = std::iter::successors(Some(error), |error| (*error).source());
    causes.find_map(|cause| {
        let errno = cause.downcast_ref::<io::Error>()?.raw_os_error()?;
        matches!(errno, libc::EPERM | libc::EACCES).then_some(errno)
    })
}

/// The end of a verifier log, which gives the reason, without the statistics that follow it.
fn reason(log: &str) -> String {
    /// Lines kept: the rejected instruction and the reason.
    const REASON_LINES: usize = 2;
    let says_why = |line: &&str| {
        let line = line.trim();
        // Statistics begin with one of the first three, source lines with a semicolon.
        let prefixes = ["processed ", "verification time ", "stack depth ", ";"];
        !line.is_empty() && !prefixes.iter().any(|prefix| line.starts_with(prefix))
    };
    let lines: Vec<&str> = log.lines().filter(says_why).map(str::trim).collect();
    lines[lines.len().saturating_sub(REASON_LINES)..].join("; ")
}

impl fmt::Display for LoadError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoBtf(_) => write!(
                f,
                "cannot read {BTF_PATH}: Tailback needs a kernel built with CONFIG_DEBUG_INFO_BTF"
            ),
            Self::BadBtf(_) => write!(f, "cannot use {BTF_PATH}"),
            Self::MissingField(missing) => write!(f, "this kernel cannot be watched: {missing}"),
            Self::KernelTooOld { program } => write!(
                f,
                "the eBPF program {program} calls a helper that this kernel does not have"
            ),
            Self::Denied { attempted, .. } | Self::Failed { attempted, .. } => {
                f.write_str(attempted)
            }
            Self::Rejected { program, log } => write!(
                f,
                "the verifier rejected the eBPF program {program}: {}",
                reason(log)
            ),
        }
    }
}

impl Error for LoadError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        match self {
            Self::NoBtf(source) | Self::Denied { source, .. } => Some(source),
            Self::BadBtf(source) | Self::Failed { source, .. } => Some(source.as_ref()),
            Self::MissingField(_) | Self::KernelTooOld { .. } | Self::Rejected { .. } => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn permission_errors_are_denials_and_others_are_not() {
        let io = |errno| io::Error::from_raw_os_error(errno);
        for errno in [libc::EPERM, libc::EACCES] {
            let error = LoadError::new("cannot create the maps", io(errno));
            assert!(matches!(error, LoadError::Denied { .. }), "{error}");
        }
        let error = LoadError::new("cannot create the maps", io(libc::ENOMEM));
        assert!(matches!(error, LoadError::Failed { .. }), "{error}");
    }

    #[test]
    fn a_rejection_gives_the_last_lines_of_the_verifier_log() {
        let log = "0: R1=ctx()\n7: (61) r1 = *(u32 *)(r1 +99)\naccess beyond struct sock\n\
                   verification time 12 usec\nstack depth 8\n\
                   processed 9 insns (limit 1000000) max_states_per_insn 0\n";
        let error = LoadError::of_verdict("files", log.to_owned());
        let text = error.to_string();
        assert!(text.ends_with("access beyond struct sock"), "{text}");
        assert!(!text.contains("processed"), "{text}");
    }

    #[test]
    fn an_unknown_helper_means_that_the_kernel_is_too_old() {
        let log = "invalid func unknown#162\nprocessed 31 insns (limit 1000000)";
        let error = LoadError::of_verdict("files", log.to_owned());
        assert!(matches!(
            error,
            LoadError::KernelTooOld { program: "files" }
        ));
    }
}
