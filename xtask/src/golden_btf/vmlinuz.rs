//! Extracts BTF from a kernel image. `Documentation/arch/x86/boot.rst` describes the position of the compressed kernel, elf(5)
//! that of its `.BTF` section.

use std::{fs, path::Path};

use anyhow::{Context as _, Result, ensure};

use crate::{command::Cmd, tools};

/// Magic bytes of each compression format, and the command that decompresses it.
const PACKERS: &[(&[u8], &[&str])] = &[
    (b"\xfd7zXZ\0", &["xz", "--decompress", "--stdout"]),
    (
        b"\x28\xb5\x2f\xfd",
        &["zstd", "--decompress", "--quiet", "--stdout"],
    ),
    (b"\x02\x21\x4c\x18", &["lz4", "--decompress", "--stdout"]),
];

pub fn btf(image: &Path) -> Result<Vec<u8>> {
    let bytes = fs::read(image).with_context(|| format!("read {}", image.display()))?;
    let elf =
        unpack(&bytes).with_context(|| format!("unpack the kernel in {}", image.display()))?;
    section(&elf, b".BTF")
        .map(<[u8]>::to_vec)
        .with_context(|| format!("find the section .BTF in {}", image.display()))
}

fn unpack(image: &[u8]) -> Result<Vec<u8>> {
    let payload = payload(image).context("not a bzImage")?;
    let (_, command) = PACKERS
        .iter()
        .find(|(magic, _)| payload.starts_with(magic))
        .context("unknown compression format")?;
    let scratch = tools::cache().join(format!("kernel.{}", std::process::id()));
    fs::write(&scratch, payload).with_context(|| format!("write {}", scratch.display()))?;
    let output = Cmd::new(command[0])
        .args(&command[1..])
        .arg(&scratch)
        .command()
        .output();
    fs::remove_file(&scratch).with_context(|| format!("remove {}", scratch.display()))?;
    let output = output.with_context(|| format!("start {}", command[0]))?;
    ensure!(
        output.stdout.starts_with(b"\x7fELF"),
        "the output of {} is not ELF: {}",
        command[0],
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(output.stdout)
}

/// The compressed kernel without the four size bytes that the kernel build appends.
fn payload(image: &[u8]) -> Option<&[u8]> {
    const SETUP_SECTS: usize = 0x1f1;
    const HEADER: usize = 0x202;
    const PAYLOAD_OFFSET: usize = 0x248;
    const PAYLOAD_LENGTH: usize = 0x24c;
    if image.get(HEADER..HEADER + 4)? != b"HdrS" {
        return None;
    }
    let setup = (usize::from(*image.get(SETUP_SECTS)?) + 1) * 512;
    let start = setup + number(image, PAYLOAD_OFFSET, 4)?;
    image.get(start..start + number(image, PAYLOAD_LENGTH, 4)?.checked_sub(4)?)
}

/// A section of a 64-bit little-endian ELF file.
fn section<'a>(elf: &'a [u8], name: &[u8]) -> Option<&'a [u8]> {
    let (headers, size) = (number(elf, 40, 8)?, number(elf, 58, 2)?);
    let (count, names) = (number(elf, 60, 2)?, number(elf, 62, 2)?);
    let header = |index: usize| headers + index * size;
    let content = |header: usize| {
        let start = number(elf, header + 24, 8)?;
        elf.get(start..start.checked_add(number(elf, header + 32, 8)?)?)
    };
    let names = content(header(names))?;
    let found = (0..count).map(header).find(|header| {
        let text = number(elf, *header, 4).and_then(|at| names.get(at..));
        text.is_some_and(|text| text.split(|byte| *byte == 0).next() == Some(name))
    });
    content(found?)
}

fn number(bytes: &[u8], at: usize, len: usize) -> Option<usize> {
    let bytes = bytes.get(at..at.checked_add(len)?)?;
    let number = bytes
        .iter()
        .rev()
        .fold(0u64, |number, byte| number << 8 | u64::from(*byte));
    usize::try_from(number).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_section_is_found_by_its_name() -> Result<()> {
        // This test program is ELF.
        let elf = fs::read(std::env::current_exe()?)?;
        let comment = section(&elf, b".comment").context("no .comment")?;
        assert!(String::from_utf8_lossy(comment).contains("rustc"));
        assert!(section(&elf, b".nothing").is_none());
        Ok(())
    }

    #[test]
    fn invalid_images_are_rejected() {
        assert!(unpack(b"").is_err());
        assert!(unpack(&[0; 4096]).is_err());
        assert!(section(b"\x7fELF", b".BTF").is_none());
    }
}
