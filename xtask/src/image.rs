//! `cargo xtask image`: the container image, as an OCI archive. Building it needs no registry and no container tool.
//!
//! The image is the binary and the directories that it uses; the same binary gives the same bytes. It runs as user 65532. The
//! binary has file capabilities, without the effective flag. So it also starts where some of them are not allowed, and reports
//! which ones are missing.

use std::{
    fs,
    io::Write,
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};
use tar::{Builder, EntryType, Header};

use crate::{architecture::Architecture, cargo, command::Cmd, tools};

#[derive(clap::Args)]
pub struct Args {
    /// Static binary for the image [default: built as `cargo xtask dist` does]
    #[arg(long, value_name = "FILE")]
    binary: Option<PathBuf>,
    /// Where to write the archive
    #[arg(long, value_name = "FILE", default_value = "target/tailback.oci.tar")]
    out: PathBuf,
}

/// Name of the image, under which `podman load` and `ctr images import` keep it.
const NAME: &str = "tailback";
const DESCRIPTION: &str = "Finds the queue that is filling in an unmodified service, says why, and warns before it is full";
/// User and group of the agent. Distroless images call them `nonroot`.
const USER: u64 = 65_532;
/// The binary in the image.
const PROGRAM: &str = "usr/bin/tailback";
/// File capabilities, by their numbers in include/uapi/linux/capability.h: DAC_READ_SEARCH, SYS_PTRACE, PERFMON, BPF.
const CAPABILITIES: [u32; 4] = [2, 19, 38, 39];
/// `VFS_CAP_REVISION_2`, without `VFS_CAP_FLAGS_EFFECTIVE`.
const CAPABILITY_REVISION: u32 = 0x0200_0000;
/// The kernel's name of file capabilities, as an extended attribute in a tar archive.
const CAPABILITY_KEY: &str = "SCHILY.xattr.security.capability";
/// Time of every file and of the image: no clock may change its bytes.
const TIME: &str = "1970-01-01T00:00:00Z";

const CONFIG: &str = "application/vnd.oci.image.config.v1+json";
const INDEX: &str = "application/vnd.oci.image.index.v1+json";
const LAYER: &str = "application/vnd.oci.image.layer.v1.tar";
const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";

pub fn main(args: &Args) -> Result<ExitCode> {
    let binary = match &args.binary {
        Some(binary) => binary.clone(),
        None => cargo::build_for_release(cargo::AGENT, Architecture::OWN)?,
    };
    let out = tools::root().join(&args.out);
    let digest = write(&binary, &out)?;
    println!("image      {NAME}:{}, {digest}", version());
    println!("archive    {}", out.display());
    println!("to use it  podman load --input {}", out.display());
    Ok(ExitCode::SUCCESS)
}

fn version() -> &'static str {
    env!("CARGO_PKG_VERSION")
}

/// Writes the image with this binary. Returns the digest of its manifest.
pub fn write(binary: &Path, out: &Path) -> Result<String> {
    let program = fs::read(binary).with_context(|| format!("read {}", binary.display()))?;
    ensure!(
        !cargo::needs_loader(&program),
        "{} is not static, and the image contains no library",
        binary.display()
    );
    let archive = Archive::new(&program, architecture(&program)?, revision().as_deref())?;
    archive.write(out)?;
    Ok(archive.digest)
}

/// Writes an image with one program and nothing else, for tests. `command`: its default arguments.
pub fn write_for_test(
    reference: &str,
    program: &Path,
    path: &str,
    command: &[&str],
    out: &Path,
) -> Result<()> {
    let program = fs::read(program).with_context(|| format!("read {}", program.display()))?;
    let mut layer = Builder::new(Vec::new());
    directory(&mut layer, "usr", 0)?;
    directory(&mut layer, "usr/bin", 0)?;
    file(&mut layer, path, 0o755, &program)?;
    let image = Image {
        reference,
        layer: layer.into_inner()?,
        architecture: architecture(&program)?,
        labels: json!({}),
        run: json!({"Entrypoint": [format!("/{path}")], "Cmd": command, "WorkingDir": "/"}),
    };
    image.archive()?.write(out)
}

/// The commit, if this is a checkout.
fn revision() -> Option<String> {
    let git = Cmd::new("git").current_dir(tools::root());
    let commit = git.args(["rev-parse", "HEAD"]).output().ok()?;
    Some(commit.trim().to_owned())
}

/// The architecture of an ELF file, as OCI names it.
fn architecture(program: &[u8]) -> Result<&'static str> {
    // `e_machine`: EM_X86_64 or EM_AARCH64.
    match program.get(18..20) {
        Some([62, 0]) => Ok("amd64"),
        Some([183, 0]) => Ok("arm64"),
        _ => anyhow::bail!("not a program for x86-64 or aarch64"),
    }
}

/// What an image consists of.
struct Image<'a> {
    /// With registry and tag.
    reference: &'a str,
    layer: Vec<u8>,
    architecture: &'static str,
    labels: Value,
    /// How its program is run: `config` of OCI's image configuration.
    run: Value,
}

/// An OCI image layout in a tar archive.
struct Archive {
    bytes: Vec<u8>,
    /// Of the manifest.
    digest: String,
}

impl Archive {
    fn new(program: &[u8], architecture: &'static str, revision: Option<&str>) -> Result<Self> {
        let mut labels = json!({
            "org.opencontainers.image.title": "Tailback",
            "org.opencontainers.image.description": DESCRIPTION,
            "org.opencontainers.image.licenses": "(MIT OR Apache-2.0) AND GPL-2.0-only",
            "org.opencontainers.image.version": version(),
        });
        if let Some(revision) = revision {
            labels["org.opencontainers.image.revision"] = revision.into();
        }
        let image = Image {
            reference: &format!("localhost/{NAME}:{}", version()),
            layer: layer(program)?,
            architecture,
            run: json!({
                "User": format!("{USER}:{USER}"),
                "Entrypoint": [format!("/{PROGRAM}")],
                "Cmd": ["run", "--all"],
                "WorkingDir": "/",
                "Labels": labels.clone(),
            }),
            labels,
        };
        image.archive()
    }

    fn write(&self, out: &Path) -> Result<()> {
        let directory = out.parent().context("the archive needs a directory")?;
        fs::create_dir_all(directory).with_context(|| format!("create {}", directory.display()))?;
        fs::write(out, &self.bytes).with_context(|| format!("write {}", out.display()))
    }
}

impl Image<'_> {
    fn archive(self) -> Result<Archive> {
        let Self {
            reference,
            layer,
            architecture,
            labels,
            run,
        } = self;
        let config = json!({
            "created": TIME,
            "architecture": architecture,
            "os": "linux",
            "config": run,
            "rootfs": {"type": "layers", "diff_ids": [digest(&layer)]},
            "history": [{"created": TIME, "created_by": "cargo xtask image"}],
        });
        let config = serde_json::to_vec(&config)?;
        let manifest = json!({
            "schemaVersion": 2,
            "mediaType": MANIFEST,
            "config": descriptor(CONFIG, &config),
            "layers": [descriptor(LAYER, &layer)],
            "annotations": labels,
        });
        let manifest = serde_json::to_vec(&manifest)?;
        let mut listed = descriptor(MANIFEST, &manifest);
        listed["platform"] = json!({"architecture": architecture, "os": "linux"});
        // podman takes the whole reference from the first, containerd from the second.
        listed["annotations"] = json!({
            "org.opencontainers.image.ref.name": reference,
            "io.containerd.image.name": reference,
        });
        let index = json!({"schemaVersion": 2, "mediaType": INDEX, "manifests": [listed]});
        let mut archive = Builder::new(Vec::new());
        let blob = |content: &[u8]| format!("blobs/sha256/{}", hex(content));
        directory(&mut archive, "blobs", 0)?;
        directory(&mut archive, "blobs/sha256", 0)?;
        for content in [&config, &layer, &manifest] {
            file(&mut archive, &blob(content), 0o644, content)?;
        }
        file(
            &mut archive,
            "index.json",
            0o644,
            &serde_json::to_vec(&index)?,
        )?;
        let layout = serde_json::to_vec(&json!({"imageLayoutVersion": "1.0.0"}))?;
        file(&mut archive, "oci-layout", 0o644, &layout)?;
        Ok(Archive {
            bytes: archive.into_inner()?,
            digest: digest(&manifest),
        })
    }
}

/// The files of the image.
fn layer(program: &[u8]) -> Result<Vec<u8>> {
    let mut layer = Builder::new(Vec::new());
    directory(&mut layer, "etc", 0)?;
    directory(&mut layer, "etc/tailback", 0)?;
    directory(&mut layer, "run", 0)?;
    directory(&mut layer, "run/tailback", USER)?;
    directory(&mut layer, "usr", 0)?;
    directory(&mut layer, "usr/bin", 0)?;
    layer.append_pax_extensions([(CAPABILITY_KEY, file_capabilities().as_slice())])?;
    file(&mut layer, PROGRAM, 0o755, program)?;
    Ok(layer.into_inner()?)
}

/// `struct vfs_cap_data`, include/uapi/linux/capability.h: the revision, then permitted and inheritable, low words first.
fn file_capabilities() -> Vec<u8> {
    let permitted = CAPABILITIES.iter().fold(0_u64, |set, bit| set | 1 << bit);
    let words = [
        CAPABILITY_REVISION,
        permitted as u32,
        0,
        (permitted >> 32) as u32,
        0,
    ];
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

fn directory(archive: &mut Builder<Vec<u8>>, name: &str, user: u64) -> Result<()> {
    let mut header = header(0o755, user);
    header.set_entry_type(EntryType::Directory);
    header.set_size(0);
    archive.append_data(&mut header, format!("{name}/"), std::io::empty())?;
    Ok(())
}

fn file(archive: &mut Builder<Vec<u8>>, name: &str, mode: u32, content: &[u8]) -> Result<()> {
    let mut header = header(mode, 0);
    header.set_entry_type(EntryType::Regular);
    header.set_size(content.len() as u64);
    archive.append_data(&mut header, name, content)?;
    Ok(())
}

fn header(mode: u32, user: u64) -> Header {
    let mut header = Header::new_ustar();
    header.set_mode(mode);
    header.set_uid(user);
    header.set_gid(user);
    header.set_mtime(0);
    header
}

fn descriptor(media_type: &str, content: &[u8]) -> Value {
    json!({"mediaType": media_type, "digest": digest(content), "size": content.len()})
}

fn digest(content: &[u8]) -> String {
    format!("sha256:{}", hex(content))
}

fn hex(content: &[u8]) -> String {
    let mut text = Vec::new();
    for byte in Sha256::digest(content) {
        // A vector takes everything.
        let _ = write!(text, "{byte:02x}");
    }
    String::from_utf8_lossy(&text).into_owned()
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeMap, io::Read as _};

    use super::*;

    /// The start of an ELF file for x86-64.
    fn program() -> Vec<u8> {
        let mut program = vec![0; 64];
        program[18] = 62;
        program
    }

    fn files(archive: &[u8]) -> BTreeMap<String, Vec<u8>> {
        let mut archive = tar::Archive::new(archive);
        let entries = archive.entries().unwrap().map(|entry| {
            let mut entry = entry.unwrap();
            let mut content = Vec::new();
            entry.read_to_end(&mut content).unwrap();
            (entry.path().unwrap().display().to_string(), content)
        });
        entries.collect()
    }

    #[test]
    fn the_same_binary_gives_the_same_bytes() {
        let write = || Archive::new(&program(), "amd64", Some("abc")).unwrap();
        let (one, other) = (write(), write());
        assert!(one.bytes == other.bytes);
        assert_eq!(one.digest, other.digest);
    }

    #[test]
    fn every_blob_has_the_name_and_size_that_refer_to_it() {
        let archive = Archive::new(&program(), "amd64", None).unwrap();
        let files = files(&archive.bytes);
        let blob = |descriptor: &Value| {
            let digest = descriptor["digest"].as_str().unwrap().to_owned();
            let name = format!("blobs/{}", digest.replace(':', "/"));
            let content = files.get(&name).unwrap_or_else(|| panic!("no {name}"));
            assert_eq!(self::digest(content), digest);
            assert_eq!(descriptor["size"], content.len());
            content.clone()
        };
        let parse = |bytes: &[u8]| serde_json::from_slice::<Value>(bytes).unwrap();
        let index = parse(&files["index.json"]);
        let manifest = parse(&blob(&index["manifests"][0]));
        let config = parse(&blob(&manifest["config"]));
        let layer = blob(&manifest["layers"][0]);
        assert_eq!(config["rootfs"]["diff_ids"][0], digest(&layer));
        assert_eq!(config["config"]["User"], "65532:65532");
    }

    #[test]
    fn the_program_has_file_capabilities_that_are_not_effective() {
        let layer = layer(&program()).unwrap();
        let mut archive = tar::Archive::new(layer.as_slice());
        let mut entries = archive.entries().unwrap().map(Result::unwrap);
        let mut entry = entries
            .find(|entry| entry.path().unwrap() == Path::new(PROGRAM))
            .unwrap();
        let mut extensions = entry.pax_extensions().unwrap().unwrap();
        let extension = extensions.next().unwrap().unwrap();
        assert_eq!(extension.key().unwrap(), CAPABILITY_KEY);
        // `setcap cap_dac_read_search,cap_sys_ptrace,cap_perfmon,cap_bpf+p`
        let expected = [
            0, 0, 0, 2, 4, 0, 8, 0, 0, 0, 0, 0, 0xc0, 0, 0, 0, 0, 0, 0, 0,
        ];
        assert_eq!(extension.value_bytes(), expected);
    }

    #[test]
    fn the_architecture_is_that_of_the_binary() {
        assert_eq!(architecture(&program()).unwrap(), "amd64");
        assert!(architecture(b"#!/bin/sh").is_err());
    }
}
