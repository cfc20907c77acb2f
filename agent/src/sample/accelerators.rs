//! Threads that work with an accelerator: a GPU, or another device for computing.

use serde::{Deserialize, Serialize};

/// A thread of a target that was in the code of an accelerator's library, or waited for an accelerator's device, in this sample.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct OnAccelerator {
    pub tgid: u32,
    pub tid: u32,
    pub through: Accelerator,
}

/// How a program reaches an accelerator.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Accelerator {
    /// libcuda (NVIDIA).
    Cuda,
    /// libamdhip64, libhsa-runtime64 (AMD).
    Hip,
    /// libze (Intel, Level Zero).
    LevelZero,
    /// /dev/nvidia….
    NvidiaDevice,
    /// /dev/kfd (AMD).
    KfdDevice,
    /// /dev/dri/….
    DriDevice,
}

impl Accelerator {
    /// The library or device, for people.
    pub fn name(self) -> &'static str {
        match self {
            Self::Cuda => "libcuda",
            Self::Hip => "the HIP runtime",
            Self::LevelZero => "libze",
            Self::NvidiaDevice => "/dev/nvidia",
            Self::KfdDevice => "/dev/kfd",
            Self::DriDevice => "/dev/dri",
        }
    }

    /// The library at a path, if it is one of these.
    pub fn of_library(path: &str) -> Option<Self> {
        let file = path.rsplit('/').next()?;
        let is = |name: &str| {
            let rest = file.strip_prefix(name);
            rest.is_some_and(|rest| rest.starts_with(".so"))
        };
        match () {
            () if is("libcuda") => Some(Self::Cuda),
            () if is("libamdhip64") || is("libhsa-runtime64") => Some(Self::Hip),
            () if is("libze_loader") || is("libze_intel_gpu") => Some(Self::LevelZero),
            () => None,
        }
    }

    /// The device at a path, if it is one of these.
    pub fn of_device(path: &str) -> Option<Self> {
        let file = path.strip_prefix("/dev/")?;
        match () {
            () if file.starts_with("nvidia") => Some(Self::NvidiaDevice),
            () if file == "kfd" => Some(Self::KfdDevice),
            () if file.starts_with("dri/") => Some(Self::DriDevice),
            () => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Accelerator;

    #[test]
    fn libraries_and_devices_are_known_by_their_names() {
        for (path, expected) in [
            (
                "/usr/lib/x86_64-linux-gnu/libcuda.so.550.54",
                Some(Accelerator::Cuda),
            ),
            ("libcuda.so.1", Some(Accelerator::Cuda)),
            ("/opt/rocm/lib/libamdhip64.so.6", Some(Accelerator::Hip)),
            ("/usr/lib/libze_loader.so.1", Some(Accelerator::LevelZero)),
            ("/usr/lib/libcudart.so.12", None),
            ("/usr/lib/libcuda.so.1/other", None),
            ("/usr/lib/mylibcuda.so", None),
            ("", None),
        ] {
            assert_eq!(Accelerator::of_library(path), expected, "{path}");
        }
        for (path, expected) in [
            ("/dev/nvidia0", Some(Accelerator::NvidiaDevice)),
            ("/dev/nvidia-uvm", Some(Accelerator::NvidiaDevice)),
            ("/dev/kfd", Some(Accelerator::KfdDevice)),
            ("/dev/dri/renderD128", Some(Accelerator::DriDevice)),
            ("/srv/dev/nvidia0", None),
            ("/dev/null", None),
        ] {
            assert_eq!(Accelerator::of_device(path), expected, "{path}");
        }
    }
}
