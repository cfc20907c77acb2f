//! An io_uring instance of the agent's own: by its file the programs tell such files from others.

use std::{
    io,
    os::fd::{FromRawFd as _, OwnedFd, RawFd},
};

/// `struct io_uring_params` of include/uapi/linux/io_uring.h, which is 120 bytes of which none need to be set.
const PARAMS_WORDS: usize = 30;

/// The smallest instance there is; nothing is ever submitted to it.
pub(super) fn probe() -> io::Result<OwnedFd> {
    let mut params = [0_u32; PARAMS_WORDS];
    // SAFETY: the kernel reads and writes the 120 bytes of `params`.
    let fd = unsafe { libc::syscall(libc::SYS_io_uring_setup, 1, params.as_mut_ptr()) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel just made this descriptor and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as RawFd) })
}
