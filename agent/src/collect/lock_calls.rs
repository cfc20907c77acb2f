//! The system calls in which threads wait for locks that other processes may hold. Pure.
#![forbid(unsafe_code)]

use crate::sample::{Detail, Syscall, Wait};

/// Operations and values of futexes (linux/futex.h).
mod futex {
    pub(super) const WAIT: u64 = 0;
    pub(super) const LOCK_PI: u64 = 6;
    pub(super) const WAIT_BITSET: u64 = 9;
    pub(super) const LOCK_PI2: u64 = 13;
    /// The memory is not shared with another process.
    pub(super) const PRIVATE_FLAG: u64 = 128;
    pub(super) const COMMAND: u64 = 0x7f;
    pub(super) const TID: u32 = 0x3fff_ffff;
    pub(super) const WAITERS: u32 = 0x8000_0000;
}

fn call(wait: &Wait) -> Option<(&Syscall, i64)> {
    let call = wait.syscall.as_ref()?;
    Some((call, i64::from(call.number)))
}

/// The descriptor of the file that a thread waits to lock.
pub(super) fn file_lock_descriptor(wait: &Wait) -> Option<u32> {
    let (call, number) = call(wait)?;
    let waits = match number {
        libc::SYS_flock => true,
        libc::SYS_fcntl => matches!(
            call.args[1] as libc::c_int,
            libc::F_SETLKW | libc::F_OFD_SETLKW
        ),
        _ => false,
    };
    // The kernel takes an int and ignores the upper half.
    waits.then_some(call.args[0] as u32)
}

/// Whether a thread sleeps for a time.
pub(super) fn is_sleep(wait: &Wait) -> bool {
    let number = call(wait).map(|(_, number)| number);
    matches!(
        number,
        Some(libc::SYS_nanosleep | libc::SYS_clock_nanosleep)
    )
}

/// The address of the mutex in shared memory that a thread waits for, and the number of the thread that holds it. glibc stores
/// that in the word itself (robust mutexes, and those with priority inheritance) or beside it.
pub(super) fn shared_mutex(wait: &Wait) -> Option<(u64, u32)> {
    let (call, number) = call(wait)?;
    let [address, op, expected, _] = call.args;
    let Detail::Futex { word, owner } = call.detail else {
        return None;
    };
    if number != libc::SYS_futex || op & futex::PRIVATE_FLAG != 0 {
        return None;
    }
    let is_expected = word == expected as u32;
    let holder = match op & futex::COMMAND {
        futex::LOCK_PI | futex::LOCK_PI2 => word & futex::TID,
        futex::WAIT | futex::WAIT_BITSET if is_expected && word & futex::WAITERS != 0 => {
            word & futex::TID
        }
        // Held, and others wait.
        futex::WAIT | futex::WAIT_BITSET if is_expected && word == 2 => owner,
        _ => return None,
    };
    (holder != 0 && holder != wait.own_tid).then_some((address, holder))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sample::{Architecture, State};

    fn wait(number: i64, args: [u64; 4], detail: Detail) -> Wait {
        Wait {
            tgid: 7,
            tid: 7,
            own_tid: 7,
            comm: String::new(),
            state: State::Sleeping,
            io: false,
            syscall: Some(Syscall {
                architecture: Architecture::OWN,
                number: number as i32,
                args,
                detail,
            }),
            voluntary: 0,
            involuntary: 0,
            cpu_ns: 0,
            run_delay_ns: 0,
        }
    }

    #[test]
    fn only_calls_that_block_on_a_file_lock_count() {
        let descriptor =
            |number, command| file_lock_descriptor(&wait(number, [5, command, 0, 0], Detail::None));
        assert_eq!(descriptor(libc::SYS_flock, 2), Some(5));
        assert_eq!(descriptor(libc::SYS_fcntl, libc::F_SETLKW as u64), Some(5));
        assert_eq!(
            descriptor(libc::SYS_fcntl, libc::F_OFD_SETLKW as u64),
            Some(5)
        );
        assert_eq!(descriptor(libc::SYS_fcntl, libc::F_SETLK as u64), None);
        assert_eq!(descriptor(libc::SYS_read, libc::F_SETLKW as u64), None);
    }

    #[test]
    fn a_mutex_in_shared_memory_names_its_owner() {
        let owner = |op, expected: u32, word, owner| {
            let args = [0x1000, op, u64::from(expected), 0];
            let mutex = wait(libc::SYS_futex, args, Detail::Futex { word, owner });
            shared_mutex(&mutex).map(|(_, owner)| owner)
        };
        let robust = futex::WAITERS | 4711;
        assert_eq!(owner(futex::WAIT, robust, robust, 0), Some(4711));
        assert_eq!(owner(futex::LOCK_PI, 0, robust, 0), Some(4711));
        assert_eq!(owner(futex::WAIT, 2, 2, 4711), Some(4711));
        assert_eq!(
            owner(futex::WAIT, 2, 2, 7),
            None,
            "a thread that waits does not hold it"
        );
        assert_eq!(owner(futex::WAIT, 2, 2, 0), None);
        assert_eq!(owner(futex::WAIT, 2, 0, 4711), None, "it was released");
        assert_eq!(owner(futex::WAIT, 5, 5, 4711), None, "a counter");
        let private = futex::WAIT | futex::PRIVATE_FLAG;
        assert_eq!(owner(private, 2, 2, 4711), None);
    }
}
