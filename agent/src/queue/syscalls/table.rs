//! The system calls that servers wait in, by their numbers on each architecture.
#![forbid(unsafe_code)]

use super::CallClass;
use crate::sample::Architecture;

macro_rules! calls {
    (
        both { $($call:ident $name:literal $does:ident $x86_64:literal $aarch64:literal,)* }
        x86_64 { $($only_call:ident $only_name:literal $only_does:ident $only_x86_64:literal,)* }
    ) => {
        /// Name and class of a system call; `None` if no server is known to wait in it.
        pub(super) fn call(architecture: Architecture, number: i32) -> Option<(&'static str, CallClass)> {
            match (architecture, number) {
                $((Architecture::X86_64, $x86_64) | (Architecture::Aarch64, $aarch64) => {
                    Some(($name, CallClass::$does))
                })*
                $((Architecture::X86_64, $only_x86_64) => Some(($only_name, CallClass::$only_does)),)*
                _ => None,
            }
        }

        /// Compares the table with the C library's numbers of the architecture that this is built for.
        const _: () = {
            $(assert!(
                numbers::$call == if cfg!(target_arch = "x86_64") { $x86_64 } else { $aarch64 },
                $name
            );)*
            $(#[cfg(target_arch = "x86_64")]
            assert!(numbers::$only_call == $only_x86_64, $only_name);)*
        };
    };
}

/// Those of the C library.
mod numbers {
    pub(super) use libc::*;

    /// The crate lacks it on aarch64.
    #[cfg(target_arch = "aarch64")]
    #[expect(non_upper_case_globals, reason = "named like the others")]
    pub(super) const SYS_sync_file_range: c_long = 84;
}

// arch/x86/entry/syscalls/syscall_64.tbl, include/uapi/asm-generic/unistd.h.
// Each: name, class, number on x86_64, number on aarch64.
calls! {
    both {
        SYS_accept "accept" Accept 43 202,
        SYS_accept4 "accept4" Accept 288 242,
        SYS_epoll_pwait "epoll_pwait" Epoll 281 22,
        SYS_epoll_pwait2 "epoll_pwait2" Epoll 441 441,
        SYS_ppoll "ppoll" Poll 271 73,
        SYS_pselect6 "pselect6" Poll 270 72,
        SYS_futex "futex" Futex 202 98,
        SYS_read "read" Read 0 63,
        SYS_readv "readv" Read 19 65,
        SYS_pread64 "pread64" Read 17 67,
        SYS_preadv "preadv" Read 295 69,
        SYS_preadv2 "preadv2" Read 327 286,
        SYS_recvfrom "recvfrom" Read 45 207,
        SYS_recvmsg "recvmsg" Read 47 212,
        SYS_recvmmsg "recvmmsg" Read 299 243,
        SYS_write "write" Write 1 64,
        SYS_writev "writev" Write 20 66,
        SYS_pwrite64 "pwrite64" Write 18 68,
        SYS_pwritev "pwritev" Write 296 70,
        SYS_pwritev2 "pwritev2" Write 328 287,
        SYS_sendto "sendto" Write 44 206,
        SYS_sendmsg "sendmsg" Write 46 211,
        SYS_sendmmsg "sendmmsg" Write 307 269,
        SYS_sendfile "sendfile" Write 40 71,
        SYS_splice "splice" Write 275 76,
        SYS_fsync "fsync" Sync 74 82,
        SYS_fdatasync "fdatasync" Sync 75 83,
        SYS_sync_file_range "sync_file_range" Sync 277 84,
        SYS_msync "msync" Sync 26 227,
        SYS_syncfs "syncfs" Sync 306 267,
        SYS_sync "sync" Sync 162 81,
        SYS_openat "openat" Path 257 56,
        SYS_ftruncate "ftruncate" Path 77 46,
        SYS_fallocate "fallocate" Path 285 47,
        SYS_getdents64 "getdents64" Path 217 61,
        SYS_unlinkat "unlinkat" Path 263 35,
        SYS_renameat2 "renameat2" Path 316 276,
        SYS_newfstatat "newfstatat" Path 262 79,
        SYS_statx "statx" Path 332 291,
        SYS_nanosleep "nanosleep" Sleep 35 101,
        SYS_clock_nanosleep "clock_nanosleep" Sleep 230 115,
        SYS_wait4 "wait4" Process 61 260,
        SYS_waitid "waitid" Process 247 95,
        SYS_rt_sigtimedwait "rt_sigtimedwait" Process 128 137,
        SYS_rt_sigsuspend "rt_sigsuspend" Process 130 133,
        SYS_connect "connect" Other 42 203,
        SYS_flock "flock" Other 73 32,
        SYS_fcntl "fcntl" Other 72 25,
        SYS_io_uring_enter "io_uring_enter" Other 426 426,
        SYS_io_getevents "io_getevents" Other 208 4,
        SYS_msgrcv "msgrcv" Other 70 188,
        SYS_semop "semop" Other 65 193,
        SYS_sched_yield "sched_yield" Other 24 124,
        SYS_madvise "madvise" Other 28 233,
        SYS_mmap "mmap" Other 9 222,
        SYS_munmap "munmap" Other 11 215,
    }
    x86_64 {
        SYS_epoll_wait "epoll_wait" Epoll 232,
        SYS_poll "poll" Poll 7,
        SYS_select "select" Poll 23,
        SYS_open "open" Path 2,
        SYS_unlink "unlink" Path 87,
        SYS_rename "rename" Path 82,
        SYS_pause "pause" Process 34,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_number_is_another_call_on_another_architecture() {
        use Architecture::{Aarch64, X86_64};
        assert_eq!(call(X86_64, 202), Some(("futex", CallClass::Futex)));
        assert_eq!(call(Aarch64, 202), Some(("accept", CallClass::Accept)));
        assert_eq!(call(Aarch64, 98), Some(("futex", CallClass::Futex)));
        // getrusage.
        assert_eq!(call(X86_64, 98), None);
        // aarch64 has no poll: 7 is fsetxattr.
        assert_eq!(call(X86_64, 7), Some(("poll", CallClass::Poll)));
        assert_eq!(call(Aarch64, 7), None);
    }
}
