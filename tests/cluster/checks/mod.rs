//! The checks, in the order in which they run.

mod attributes;
mod faults;
mod install;
mod manifests;
mod pages;
mod removal;
mod sidecar;
mod updates;
mod verdicts;

use anyhow::Result;

use crate::stage::Stage;

/// Whether a check runs although the filter leaves it out.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Need {
    /// Others need it. If it fails, the others do not run.
    Always,
    IfWanted,
}

pub struct Check {
    pub name: &'static str,
    pub need: Need,
    pub run: fn(&Stage) -> Result<()>,
}

const fn check(name: &'static str, run: fn(&Stage) -> Result<()>) -> Check {
    Check {
        name,
        need: Need::IfWanted,
        run,
    }
}

pub const CHECKS: &[Check] = &[
    check(
        "the_api_server_accepts_every_manifest",
        manifests::are_accepted,
    ),
    Check {
        need: Need::Always,
        ..check(
            "the_chart_is_installed_as_documented",
            install::as_documented,
        )
    },
    check(
        "a_namespace_of_level_baseline_refuses_the_agent",
        install::baseline_refuses,
    ),
    check(
        "node_agent_and_host_give_the_same_verdicts",
        verdicts::of_node,
    ),
    check(
        "spans_and_metrics_name_pod_and_node",
        attributes::on_spans_and_metrics,
    ),
    check("a_pod_reads_its_own_page", pages::in_the_pod),
    check("a_sidecar_gives_the_same_verdict", sidecar::same_verdict),
    check("a_sidecar_ends_with_its_job", sidecar::ends_with_its_job),
    check(
        "a_changed_config_map_is_applied_although_the_adapter_process_is_killed",
        updates::config_map,
    ),
    check("an_agent_that_hangs_is_restarted", faults::hung),
    check(
        "a_rolling_update_leaves_no_page_expired",
        updates::rolling_update,
    ),
    check("signals_fail_open_when_the_agent_is_killed", faults::killed),
    check("removal_leaves_nothing", removal::leaves_nothing),
];
