//! The eBPF object while its programs are being loaded.

use std::os::fd::{AsFd as _, OwnedFd};

use aya::{
    Ebpf, EbpfLoader,
    maps::Map,
    programs::{BtfTracePoint, Iter},
};
use tailback_ebpf::{Controllers, Helpers, Layout, Processor, Types};

use super::{Capability, LoadOptions};
use crate::kernel::{
    LoadError, cast,
    hooks::{self, HookMaps, Hooks},
    iter::{IterScope, Link},
    layout::Resolved,
    log, processor,
    scanner::link,
};

/// The eBPF object, compressed. `build.rs` checks that it belongs to these sources.
const OBJECT: &[u8] = include_bytes!(env!("EBPF_OBJECT"));

#[derive(Clone, Copy)]
#[repr(transparent)]
struct LayoutPod(Layout);
// SAFETY: `Layout` is plain old data (bytemuck checks it).
unsafe impl aya::Pod for LayoutPod {}

#[derive(Clone, Copy)]
#[repr(transparent)]
struct TypesPod(Types);
// SAFETY: `Types` is plain old data (bytemuck checks it).
unsafe impl aya::Pod for TypesPod {}

#[derive(Clone, Copy)]
#[repr(transparent)]
struct HelpersPod(Helpers);
// SAFETY: `Helpers` is plain old data (bytemuck checks it).
unsafe impl aya::Pod for HelpersPod {}

#[derive(Clone, Copy)]
#[repr(transparent)]
struct ControllersPod(Controllers);
// SAFETY: `Controllers` is plain old data (bytemuck checks it).
unsafe impl aya::Pod for ControllersPod {}

#[derive(Clone, Copy)]
#[repr(transparent)]
struct ProcessorPod(Processor);
// SAFETY: `Processor` is plain old data (bytemuck checks it).
unsafe impl aya::Pod for ProcessorPod {}

/// The object with its maps created, while its programs are being loaded.
pub(super) struct Object {
    pub(super) ebpf: Ebpf,
    kernel_btf: aya::Btf,
    /// Reasons of programs that the verifier rejected. Their number shows whether logging costs programs.
    pub(super) rejected: Vec<String>,
}

impl Object {
    /// Resolves the object for this kernel and creates its maps. Those of hooks that are not wanted have one entry.
    pub(super) fn open(fields: &Resolved, options: LoadOptions) -> Result<Self, LoadError> {
        let log_bpf = options.log_bpf;
        let kernel_btf =
            aya::Btf::from_sys_fs().map_err(|error| LoadError::BadBtf(error.into()))?;
        let mut object = zstd::decode_all(OBJECT)
            .map_err(|error| LoadError::new("cannot decompress the eBPF object", error))?;
        if let Some(kfunc) = fields.cast {
            cast::resolve_calls(&mut object, kfunc);
        }
        let layout = LayoutPod(fields.layout);
        let helpers = HelpersPod(fields.helpers);
        let types = TypesPod(fields.types);
        let controllers = ControllersPod(fields.controllers);
        let processor = ProcessorPod(processor::of_this_machine(&fields.layout));
        let log_level = log::level(log_bpf);
        let object_calls = hooks::object_calls();
        let mut loader = EbpfLoader::new();
        loader
            .btf(Some(&kernel_btf))
            .override_global("LAYOUT", &layout, true)
            .override_global("HELPERS", &helpers, true)
            .override_global("TYPES", &types, true)
            .override_global("CONTROLLERS", &controllers, true)
            .override_global("PROCESSOR", &processor, true)
            .override_global(hooks::OBJECT_CALLS_GLOBAL, &object_calls[..], true)
            .override_global(log::LEVEL_GLOBAL, &log_level, true);
        if options.hooks {
            // An unknown number of CPUs fails later, when a per-CPU map is created.
            let cpus = aya::util::nr_cpus().unwrap_or(1);
            loader.map_max_entries(hooks::WAITS_MAP, hooks::wait_keys(cpus));
        } else {
            for map in hooks::MAPS {
                loader.map_max_entries(map, 1);
            }
        }
        if !log_bpf {
            // Every map of the object is created; aya rounds this one up to a page.
            loader.map_max_entries(log::LOG_MAP, 1);
        }
        let ebpf = loader
            .load(&object)
            .map_err(|error| LoadError::new("cannot create the eBPF maps", error))?;
        Ok(Self {
            ebpf,
            kernel_btf,
            rejected: Vec::new(),
        })
    }

    /// Loads one iterator. `target` is what the kernel iterates over, as in `iter/target`.
    pub(super) fn load(&mut self, program: &'static str, target: &str) -> Result<(), LoadError> {
        let iter: &mut Iter = self
            .ebpf
            .program_mut(program)
            .and_then(|program| program.try_into().ok())
            .ok_or_else(|| missing_part(program))?;
        iter.load(target, &self.kernel_btf).map_err(|error| {
            let error = LoadError::of_program(program, error);
            if let LoadError::Rejected { .. } | LoadError::KernelTooOld { .. } = error {
                self.rejected.push(error.to_string());
            }
            error
        })
    }

    /// Loads the hooks, without attaching them.
    pub(super) fn load_hooks(&mut self) -> Result<Hooks, LoadError> {
        let programs = hooks::PROGRAMS.map(|program| self.load_hook(program));
        let programs = programs.into_iter().collect::<Result<_, _>>()?;
        let ebpf = &mut self.ebpf;
        let maps = HookMaps::take(|name| {
            let map = ebpf.take_map(name);
            map.ok_or_else(|| missing_part(name).into())
        });
        let maps =
            maps.map_err(|error| LoadError::new("cannot use the maps of the hooks", error))?;
        Ok(Hooks::new(programs, maps))
    }

    fn load_hook(&mut self, program: &'static str) -> Result<OwnedFd, LoadError> {
        let hook: &mut BtfTracePoint = self
            .ebpf
            .program_mut(program)
            .and_then(|program| program.try_into().ok())
            .ok_or_else(|| missing_part(program))?;
        hook.load(program, &self.kernel_btf)
            .map_err(|error| LoadError::of_program(program, error))?;
        let fd = hook
            .fd()
            .map_err(|error| LoadError::of_program(program, error))?;
        let fd = fd.as_fd().try_clone_to_owned();
        fd.map_err(|error| LoadError::new(format!("cannot keep the eBPF program {program}"), error))
    }

    /// Loads one iterator and creates a link over everything it can visit.
    pub(super) fn load_over_all(
        &mut self,
        program: &'static str,
        target: &str,
    ) -> Result<Link, LoadError> {
        self.load(program, target)?;
        self.link(program, IterScope::All)
    }

    pub(super) fn link(&self, program: &'static str, over: IterScope) -> Result<Link, LoadError> {
        link(&self.ebpf, program, over)
            .map_err(|error| LoadError::new(format!("cannot create the iterator {program}"), error))
    }

    /// Takes a map out of the object.
    pub(super) fn map<T: TryFrom<Map, Error = aya::maps::MapError>>(
        &mut self,
        name: &'static str,
    ) -> Result<T, LoadError> {
        let map = self.ebpf.take_map(name).ok_or_else(|| missing_part(name))?;
        T::try_from(map)
            .map_err(|error| LoadError::new(format!("cannot use the eBPF map {name}"), error))
    }
}

/// The object was built without a program or map that the agent needs: a bug.
pub(super) fn missing_part(name: &str) -> LoadError {
    LoadError::new(
        "cannot use the eBPF object",
        format!("it does not contain {name}"),
    )
}

/// An error with its causes, as the reason why a capability is off.
pub(super) fn off(error: LoadError) -> String {
    format!("{:#}", anyhow::Error::new(error))
}

/// A scan for which there are two programs, and which of them loaded.
pub(super) struct ProgramChoice {
    pub(super) program: &'static str,
    /// Whether the better one works.
    pub(super) better: Capability,
    /// Whether any works.
    pub(super) any: Result<(), LoadError>,
}

impl ProgramChoice {
    /// Loads `better` unless this kernel lacks what it needs, which `lacking` names. If it does not load, loads `fallback`.
    pub(super) fn load(
        object: &mut Object,
        target: &str,
        [better, fallback]: [&'static str; 2],
        lacking: Option<&str>,
    ) -> Self {
        let loaded = match lacking {
            Some(reason) => Err(reason.to_owned()),
            None => object.load(better, target).map_err(off),
        };
        if loaded.is_ok() {
            return Self {
                program: better,
                better: loaded,
                any: Ok(()),
            };
        }
        Self {
            program: fallback,
            better: loaded,
            any: object.load(fallback, target),
        }
    }

    /// Checks that a link can be created, without running the scan.
    pub(super) fn check_link(&mut self, object: &Object) {
        if self.any.is_ok() {
            self.any = object.link(self.program, IterScope::All).map(drop);
        }
    }
}
