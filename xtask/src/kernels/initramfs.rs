//! Writes an initramfs: an archive in the "newc" form of cpio, as the kernel's
//! `Documentation/driver-api/early-userspace/buffer-format.rst` describes it.
//!
//! It is uncompressed: the kernel accepts that, and an emulated CPU would need more time to unpack than the emulator needs
//! to read.

use anyhow::{Context as _, Result};

#[derive(Clone, Default)]
pub struct Initramfs {
    archive: Vec<u8>,
    entries: u32,
    /// The first file that is too large for the format.
    too_large: Option<String>,
}

const REGULAR: u32 = 0o100_000;

impl Initramfs {
    /// Adds a file at the root.
    pub fn file(&mut self, name: &str, permissions: u32, content: &[u8]) {
        match u32::try_from(content.len()) {
            Ok(size) => self.entry(name, REGULAR | permissions, size, content),
            Err(_) => self.too_large = Some(name.to_owned()),
        }
    }

    pub fn finish(mut self) -> Result<Vec<u8>> {
        self.entry("TRAILER!!!", 0, 0, &[]);
        match self.too_large {
            Some(name) => {
                Err(anyhow::anyhow!("{name} is larger than 4 GiB")).context("pack an initramfs")
            }
            None => Ok(self.archive),
        }
    }

    /// The magic number, thirteen fields of eight hexadecimal digits, the name and the content; both padded to
    /// four bytes.
    fn entry(&mut self, name: &str, mode: u32, size: u32, content: &[u8]) {
        self.entries += 1;
        let name_size = u32::try_from(name.len() + 1).unwrap_or(u32::MAX);
        let (inode, links) = (self.entries, 1);
        let fields = [inode, mode, 0, 0, links, 0, size, 0, 0, 0, 0, name_size, 0];
        self.archive.extend_from_slice(b"070701");
        for field in fields {
            self.archive
                .extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.archive.extend_from_slice(name.as_bytes());
        self.archive.push(0);
        self.pad();
        self.archive.extend_from_slice(content);
        self.pad();
    }

    fn pad(&mut self) {
        self.archive
            .resize(self.archive.len().next_multiple_of(4), 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_part_begins_at_a_multiple_of_four() -> Result<()> {
        let mut initramfs = Initramfs::default();
        initramfs.file("odd", 0o644, b"12345");
        let archive = initramfs.finish()?;
        assert_eq!(archive.len() % 4, 0);
        // The header has 110 bytes, "odd" and its end four, so two are padding.
        assert_eq!(&archive[116..121], b"12345");
        assert_eq!(&archive[124..130], b"070701");
        Ok(())
    }
}
