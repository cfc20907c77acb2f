//! Creates an io_uring instance of the agent's own: its `file_operations` identify such files to the programs.

use std::{
    io,
    os::fd::{FromRawFd as _, OwnedFd, RawFd},
};

/// Size of `struct io_uring_params` (include/uapi/linux/io_uring.h) in u32 words: 120 bytes, which may all be 0.
const PARAMS_WORDS: usize = 30;

/// Creates an instance of the smallest size. Nothing is ever submitted to it.
pub(super) fn probe() -> io::Result<OwnedFd> {
    let mut params = [0_u32; PARAMS_WORDS];
    // SAFETY: the kernel reads and writes the 120 bytes of `params`.
    let fd = unsafe { libc::syscall(libc::SYS_io_uring_setup, 1, params.as_mut_ptr()) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel just created this descriptor, and nothing else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as RawFd) })
}
