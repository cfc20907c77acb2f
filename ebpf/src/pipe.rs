//! Pipes and FIFOs: the ring of buffers between the two ends.

use tailback_ebpf::{
    Header, HolderRecord, KIND_HOLDER, KIND_PIPE, PIPE_BYTES_UNKNOWN, PIPE_READ_END,
    PIPE_WRITE_END, PipeRecord,
};

use crate::{
    kernel::{Sink, emit, load, offset, probe_at},
    task_file::Handle,
};

/// include/uapi/linux/stat.h
pub const S_IFMT: u16 = 0o170_000;
pub const S_IFIFO: u16 = 0o010_000;
/// include/linux/fs.h
pub const FMODE_READ: u32 = 1;
const FMODE_WRITE: u32 = 2;
/// Maximum number of buffers of one pipe whose bytes are summed: the size of a default ring (`PIPE_DEF_BUFFERS`,
/// include/linux/pipe_fs_i.h).
const SUMMED_BUFFERS: u32 = 16;

/// One end of a pipe.
pub struct Pipe {
    inode: *const u8,
    pipe: *const u8,
    end: u32,
}

impl Pipe {
    #[inline(always)]
    pub fn of(file: *const u8) -> Option<Self> {
        let inode = load!(file, file_inode, *const u8);
        if load!(inode, inode_mode, u16) & S_IFMT != S_IFIFO {
            return None;
        }
        let pipe = load!(inode, inode_pipe, *const u8);
        if pipe.is_null() {
            return None;
        }
        let mode = load!(file, file_mode, u32);
        let mut end = 0;
        if mode & FMODE_READ != 0 {
            end |= PIPE_READ_END;
        }
        if mode & FMODE_WRITE != 0 {
            end |= PIPE_WRITE_END;
        }
        Some(Self { inode, pipe, end })
    }

    #[inline(always)]
    pub fn emit_holder(&self, out: impl Sink, handle: Handle) {
        let record = HolderRecord {
            header: Header {
                kind: KIND_HOLDER,
                len: size_of::<HolderRecord>() as u16,
                tgid: handle.tgid,
            },
            inode: load!(self.inode, inode_ino, u64),
            fd: handle.fd,
            end: self.end,
        };
        emit(out, &record);
    }

    #[inline(always)]
    pub fn emit(&self, out: impl Sink, handle: Handle) {
        let head = load!(self.pipe, pipe_head, u32);
        let tail = load!(self.pipe, pipe_tail, u32);
        let record = PipeRecord {
            header: Header {
                kind: KIND_PIPE,
                len: size_of::<PipeRecord>() as u16,
                tgid: handle.tgid,
            },
            inode: load!(self.inode, inode_ino, u64),
            fd: handle.fd,
            end: self.end,
            head,
            tail,
            limit: load!(self.pipe, pipe_max_usage, u32),
            bytes: self.bytes(head, tail),
            readers: load!(self.pipe, pipe_readers, u32),
            writers: load!(self.pipe, pipe_writers, u32),
            reserved: 0,
        };
        emit(out, &record);
    }

    /// Bytes in the pipe: the sum over the occupied buffers, each of up to a page.
    #[inline(always)]
    fn bytes(&self, head: u32, tail: u32) -> u32 {
        let used = head.wrapping_sub(tail);
        if used == 0 {
            return 0;
        }
        if used > SUMMED_BUFFERS {
            return PIPE_BYTES_UNKNOWN;
        }
        let ring = load!(self.pipe, pipe_bufs, *const u8);
        let mask = load!(self.pipe, pipe_ring_size, u32).wrapping_sub(1);
        let mut bytes: u32 = 0;
        let mut i = 0;
        while i < SUMMED_BUFFERS {
            if i >= used {
                break;
            }
            let slot = u64::from(tail.wrapping_add(i) & mask);
            let at =
                slot * u64::from(offset!(pipe_buffer_size)) + u64::from(offset!(pipe_buffer_len));
            // Typed loads cannot index an array behind a pointer: a probe read can.
            bytes = bytes.wrapping_add(probe_at::<u32>(ring, at));
            i += 1;
        }
        bytes
    }
}
