//! `tailback doctor`: what this kernel supports, how each fact is read, what is missing and how to get it; and whether the
//! consumers of the running adapters are set up to act on the signals.

mod apps;
mod configuration;
mod deployment;
mod privileges;

use std::{
    borrow::Cow,
    io::{self, Write},
    path::PathBuf,
};

use anyhow::Context as _;
use clap::Args;
use serde_json::{Value, json};

use super::{Failure, capabilities::Held, exit_code::Outcome, session, status::directory_only};
use crate::{
    adapters::agent::ask_adapter_process,
    config::{Config, signal::Signal},
    kernel::{
        layout::Feature,
        scanner::{Capabilities, LoadOptions},
    },
    signal::directory::in_use,
};

#[derive(Debug, Args)]
pub(super) struct Options {
    /// The agent's configuration file, to check the adapters in its [signal] section
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Print JSON, one object per line
    #[arg(long)]
    json: bool,
}

/// One line of the report.
struct Check {
    name: Cow<'static, str>,
    /// `Err`: off, with the reason.
    state: Result<String, String>,
    /// What the user loses without it.
    cost: &'static str,
    /// How to get it.
    remedy: Cow<'static, str>,
    /// Reported as FAIL instead of off: the agent needs it, or its absence is a bug.
    required: bool,
}

/// One adapter, or what is wrong with it.
struct AdapterCheck {
    name: String,
    state: Result<String, Problem>,
}

/// Why an adapter does not have its effect.
struct Problem {
    code: String,
    why: String,
    remedy: String,
}

impl Problem {
    fn new(code: &str, why: String, remedy: &str) -> Self {
        Self {
            code: code.to_owned(),
            why,
            remedy: remedy.to_owned(),
        }
    }
}

pub(super) fn run(options: &Options) -> Outcome<()> {
    let config = options.config.as_deref().map(Config::read);
    let signal = match &config {
        Some(Ok(config)) => config.signal.clone(),
        Some(Err(_)) | None => directory_only(options.config.as_deref()),
    };
    let held = Held::raise();
    // Loads the hooks as well, without attaching them: whether this kernel accepts them.
    let loaded = session::load(LoadOptions {
        hooks: true,
        ..LoadOptions::default()
    });
    let mut checks = configuration::checks(config.as_ref(), &signal).map_err(Failure::bug)?;
    checks.extend(privileges::checks(&held, &signal));
    checks.extend(deployment::environment());
    let loaded = match loaded {
        Ok(scanner) => {
            let of_kernel = capability_checks(scanner.capabilities());
            checks.extend(deployment::visible(scanner, config.as_ref()));
            checks.extend(of_kernel);
            Ok(())
        }
        Err(failure) => Err(failure),
    };
    match &loaded {
        Ok(()) => {}
        Err(failure) => checks.push(Check {
            name: "eBPF programs".into(),
            state: Err(failure.to_string()),
            cost: "nothing can be watched",
            remedy: "see the reason above".into(),
            required: true,
        }),
    }
    let adapters = adapter_checks(&signal).map_err(Failure::bug)?;
    let mut out = io::stdout();
    if options.json {
        print_json(&mut out, &checks).and_then(|()| print_adapters_json(&mut out, &adapters))
    } else {
        print(&mut out, &checks).and_then(|()| print_adapters(&mut out, &adapters))
    }
    .map_err(Failure::stdout)?;
    if let Some(Err(error)) = config {
        return Err(Failure::usage(error));
    }
    loaded
}

fn capability_checks(capabilities: &Capabilities) -> Vec<Check> {
    let helpers = capabilities.fields.helpers;
    let either =
        |has: u32, better: &str, other: &str| if has == 1 { better } else { other }.to_owned();
    let sockets = || {
        either(
            helpers.typed_sockets,
            "iterator, typed loads (the verifier checks every offset)",
            "iterator, probe reads (offsets from BTF only: no typed sockets)",
        )
    };
    let how = |feature: Feature| match feature {
        Feature::Base
        | Feature::AcceptAges
        | Feature::HalfOpen
        | Feature::Drops
        | Feature::Requests
        | Feature::ResponseRate
        | Feature::Ipv6 => sockets(),
        Feature::Udp | Feature::Unix => {
            format!("{}; protocol-specific fields by probe reads", sockets())
        }
        Feature::Rings
        | Feature::EpollReady
        | Feature::Mptcp
        | Feature::Cgroups
        | Feature::CpuQuotas
        | Feature::MemoryLimits
        | Feature::Stalls => "iterator, probe reads".to_owned(),
        Feature::Syscalls => either(
            helpers.task_registers,
            "iterator, registers by bpf_task_pt_regs",
            "iterator, registers from the top of the kernel stack",
        ),
        Feature::Pipes
        | Feature::FileLimit
        | Feature::RunDelay
        | Feature::OnCpu
        | Feature::BatchedScans
        | Feature::UserMemory
        | Feature::DropCounters => "iterator, typed loads".to_owned(),
    };
    let mut checks: Vec<Check> = Feature::ALL
        .iter()
        // Missing drop counters cost nothing; the others have lines of their own.
        .filter(|feature| {
            let own_line = matches!(feature, Feature::UserMemory | Feature::BatchedScans);
            !own_line && **feature != Feature::DropCounters
        })
        .map(|feature| Check {
            name: feature.title().into(),
            state: match (
                capabilities.fields.missing_for(*feature),
                feature,
                (&capabilities.rings, &capabilities.epolls),
            ) {
                (Some(missing), ..) => Err(missing.to_string()),
                (None, Feature::Rings, (Err(reason), _))
                | (None, Feature::EpollReady, (_, Err(reason))) => Err(reason.clone()),
                (
                    None,
                    Feature::Cgroups | Feature::CpuQuotas | Feature::MemoryLimits | Feature::Stalls,
                    _,
                ) if let Some(reason) = capabilities.without_cgroups() => Err(reason),
                _ => Ok(how(*feature)),
            },
            cost: feature.cost(),
            remedy: "another kernel; nothing else depends on it".into(),
            required: *feature == Feature::Base,
        })
        .collect();
    for (scan, reason) in capabilities.failed_scans() {
        checks.push(Check {
            name: scan.into(),
            state: Err(reason.to_owned()),
            cost: "the queues that it reports are not watched",
            remedy: "report it, with the reason above and the kernel version".into(),
            required: true,
        });
    }
    checks.push(Check {
        name: Feature::UserMemory.title().into(),
        state: capabilities
            .user_memory
            .clone()
            .map(|()| "page tables by probe reads: resident pages only, no page faults".to_owned()),
        cost: Feature::UserMemory.cost(),
        remedy: "no Xen PV guest, with /proc/zoneinfo readable".into(),
        required: false,
    });
    checks.push(Check {
        name: "socket identity".into(),
        state: Ok(either(
            helpers.cookies,
            "socket cookies",
            "socket cookies if assigned, else the hashed address of the socket",
        )),
        cost: "-",
        remedy: "-".into(),
        required: false,
    });
    checks.push(Check {
        name: "scans of the targets only".into(),
        state: capabilities
            .bound_to_process
            .clone()
            .map(|()| "iterators bound to processes".to_owned()),
        cost: "every scan visits all files and threads on the host, which costs more CPU if there are many",
        remedy: "Linux 6.1 or later".into(),
        required: false,
    });
    checks.push(Check {
        name: "listeners and focused sockets on every sample".into(),
        state: capabilities
            .focused_sockets
            .clone()
            .map(|()| "iterator over socket-local storage".to_owned()),
        cost: "they are seen by the file scan, whose interval grows with the number of sockets",
        remedy: "Linux 5.13 or later".into(),
        required: false,
    });
    checks.push(Check {
        name: "fast start".into(),
        state: capabilities
            .bpf_loop
            .clone()
            .map(|()| "bpf_loop (the verifier checks one round of a loop)".to_owned()),
        cost: "the agent takes a few tenths of a second longer to start: the verifier checks every iteration of a loop",
        remedy: "Linux 5.17 or later".into(),
        required: false,
    });
    checks.push(Check {
        name: Feature::BatchedScans.title().into(),
        state: capabilities.batched_scans.clone().map(|()| {
            "bpf_rdonly_cast (one visit for all threads of a process, and one for all its files)"
                .to_owned()
        }),
        cost: Feature::BatchedScans.cost(),
        remedy: "Linux 6.2 or later".into(),
        required: false,
    });
    checks.push(Check {
        name: "exact waits".into(),
        state: capabilities.hooks.clone().map(|()| {
            format!(
                "hooks at sched_switch and sched_wakeup, registers {}; attached with `--tier` only",
                either(
                    helpers.task_registers,
                    "by bpf_task_pt_regs",
                    "from the top of the kernel stack",
                )
            )
        }),
        cost: "`--tier` has no effect: waits for a CPU and in system calls are estimated from samples",
        remedy: "Linux 5.10 or later, except 5.18.0 to 5.18.5, with CAP_PERFMON".into(),
        required: false,
    });
    checks.push(Check {
        name: "hooks".into(),
        state: Ok(
            "none attached unless `--tier` asks for them: system calls and packets of the watched service are unaffected"
                .to_owned(),
        ),
        cost: "-",
        remedy: "-".into(),
        required: false,
    });
    checks
}

/// The adapters of the running adapter process. Nothing if none is configured or running.
fn adapter_checks(signal: &Signal) -> anyhow::Result<Vec<AdapterCheck>> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot connect to the adapter process")?;
    let status = runtime.block_on(ask_adapter_process(&in_use(&signal.directory())));
    let parse = |text: String| {
        serde_json::from_str::<Value>(&text).context("invalid JSON from the adapter process")
    };
    Ok(match status.and_then(parse) {
        Ok(status) => {
            let adapters = status["adapters"].as_array();
            adapters.into_iter().flatten().flat_map(checks_of).collect()
        }
        Err(_) if !signal.has_adapters() => Vec::new(),
        Err(error) => vec![AdapterCheck {
            name: "adapters".to_owned(),
            state: Err(Problem::new(
                "not_running",
                format!("{error:#}: no consumer gets a signal"),
                "`tailback run --config FILE`, which starts the adapter process",
            )),
        }],
    })
}

/// The checks of one adapter: all its problems, or that it has none.
fn checks_of(adapter: &Value) -> Vec<AdapterCheck> {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let name = format!("{} {}", text(&adapter["adapter"]), text(&adapter["at"]));
    let mut problems = Vec::new();
    if let Some(failure) = adapter["failure"].as_str() {
        problems.push(Problem::new(
            "failed",
            failure.to_owned(),
            "fix the cause named above; the adapter retries by itself",
        ));
    }
    let warnings = adapter["warnings"].as_array().into_iter().flatten();
    problems.extend(warnings.map(|warning| {
        let (code, remedy) = (text(&warning["code"]), text(&warning["remedy"]));
        Problem::new(&code, text(&warning["text"]), &remedy)
    }));
    if problems.is_empty() {
        let how = match adapter["last_reply"].as_str() {
            Some(reply) if !reply.is_empty() => format!("last reply: {reply}"),
            _ => "no client yet".to_owned(),
        };
        return vec![AdapterCheck {
            name,
            state: Ok(how),
        }];
    }
    let of_problem = |problem| AdapterCheck {
        name: name.clone(),
        state: Err(problem),
    };
    problems.into_iter().map(of_problem).collect()
}

fn print_adapters(out: &mut impl Write, checks: &[AdapterCheck]) -> io::Result<()> {
    for check in checks {
        match &check.state {
            Ok(how) => writeln!(out, "ok   {}: {how}", check.name)?,
            Err(problem) => {
                writeln!(out, "warn {}: {}", check.name, problem.why)?;
                writeln!(out, "     to fix it: {}", problem.remedy)?;
            }
        }
    }
    Ok(())
}

fn print_adapters_json(out: &mut impl Write, checks: &[AdapterCheck]) -> io::Result<()> {
    for check in checks {
        serde_json::to_writer(&mut *out, &check.to_json())?;
        writeln!(out)?;
    }
    Ok(())
}

fn print(out: &mut impl Write, checks: &[Check]) -> io::Result<()> {
    let width = checks
        .iter()
        .map(|check| check.name.chars().count())
        .max()
        .unwrap_or(0);
    for check in checks {
        match &check.state {
            Ok(how) => writeln!(out, "ok   {:<width$}  {how}", check.name)?,
            Err(why) => {
                let word = if check.required { "FAIL" } else { "off " };
                writeln!(out, "{word} {:<width$}  {why}", check.name)?;
                writeln!(out, "     {:<width$}  without it: {}", "", check.cost)?;
                writeln!(out, "     {:<width$}  to get it: {}", "", check.remedy)?;
            }
        }
    }
    Ok(())
}

fn print_json(out: &mut impl Write, checks: &[Check]) -> io::Result<()> {
    for check in checks {
        serde_json::to_writer(&mut *out, &check.to_json())?;
        writeln!(out)?;
    }
    Ok(())
}

impl Check {
    fn to_json(&self) -> Value {
        match &self.state {
            Ok(how) => json!({"type": "check", "name": self.name, "state": "ok", "how": how}),
            Err(why) => json!({
                "type": "check", "name": self.name, "state": if self.required { "failed" } else { "off" },
                "why": why, "cost": self.cost, "remedy": self.remedy,
            }),
        }
    }
}

impl AdapterCheck {
    fn to_json(&self) -> Value {
        match &self.state {
            Ok(how) => json!({"type": "check", "name": self.name, "state": "ok", "how": how}),
            Err(problem) => json!({
                "type": "check", "name": self.name, "state": "warning",
                "code": problem.code, "why": problem.why, "remedy": problem.remedy,
            }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::emit::json::reference::assert_documented;

    #[test]
    fn the_keys_of_a_check_are_those_of_the_documentation() {
        let check = |state| Check {
            name: "kernel".into(),
            state,
            cost: "-",
            remedy: "mount /proc".into(),
            required: true,
        };
        let states = [Ok("6.1.0".to_owned()), Err("no /proc".to_owned())];
        let mut objects = states.map(|state| check(state).to_json()).to_vec();
        let adapter = json!({"adapter": "haproxy", "at": "127.0.0.1:1", "warnings": [
            {"code": "slow_checks", "text": "checks every 10 s", "remedy": "set `agent-inter 200ms`"}]});
        objects.extend(checks_of(&adapter).iter().map(AdapterCheck::to_json));
        assert_documented("check", &objects);
    }
}
