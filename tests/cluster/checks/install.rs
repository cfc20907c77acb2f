//! The commands of docs/guides/kubernetes.md, as they are written there.

use std::{
    env, fs,
    path::{Path, PathBuf},
    time::Instant,
};

use anyhow::{Context as _, Result, bail, ensure};

use crate::{
    cluster::{ctr, given, output},
    stage::{AGENT, DEADLINE, Stage},
};

pub const CHART: &str = "deploy/chart/tailback";
const GUIDE: &str = "docs/guides/kubernetes.md";
/// The guide's registry.
const REGISTRY: &str = "registry.example/tailback";
/// The command that gets a collector in addition.
const INSTALL: &str = "helm install";

/// The checkout.
pub fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

pub fn helm() -> Result<PathBuf> {
    given("TAILBACK_HELM")
}

/// The lines of the first block of commands after this heading.
fn commands(heading: &str) -> Result<Vec<String>> {
    let text = fs::read_to_string(repository().join(GUIDE)).with_context(|| GUIDE.to_owned())?;
    let (_, after) = text
        .split_once(&format!("\n## {heading}\n"))
        .with_context(|| format!("{GUIDE} has no heading {heading:?}"))?;
    let (_, block) = after.split_once("```sh\n").context("a block")?;
    let (block, _) = block.split_once("\n```").context("its end")?;
    Ok(block.lines().map(str::to_owned).collect())
}

/// Runs a line of the guide in a shell.
fn run(stage: &Stage, line: &str) -> Result<String> {
    let mut path = vec![stage.kubectl().directory().to_owned()];
    path.push(helm()?.parent().context("a directory")?.to_owned());
    path.extend(env::split_paths(&env::var_os("PATH").unwrap_or_default()));
    let mut shell = stage.kubectl().command("timeout");
    shell
        .args([&DEADLINE.as_secs().to_string(), "sh", "-ec", line])
        .env("PATH", env::join_paths(path)?);
    output(shell.current_dir(repository()))
}

pub fn as_documented(stage: &Stage) -> Result<()> {
    let archive = given("TAILBACK_IMAGE")?.display().to_string();
    let import = ["images", "import", &archive];
    let documented = format!("sudo ctr --namespace k8s.io {}", import[..2].join(" "));
    ensure!(
        commands("The image")?
            .iter()
            .any(|line| line.starts_with(&documented)),
        "{GUIDE} does not have `{documented}`"
    );
    ctr(&import)?;
    // As if the node had pulled it from the guide's registry.
    let version = env!("CARGO_PKG_VERSION");
    let local = format!("localhost/tailback:{version}");
    ctr(&["images", "tag", &local, &format!("{REGISTRY}:{version}")])?;

    let began = Instant::now();
    let lines = commands("The chart")?;
    let (install, doctor) = ("helm install", "tailback doctor");
    for part in [install, doctor, REGISTRY] {
        ensure!(
            lines.iter().any(|line| line.contains(part)),
            "no {part} in {lines:?}"
        );
    }
    for line in lines {
        let more = format!(" --set otlpEndpoint={}", stage.collector.otlp_http());
        let is_install = line.starts_with(INSTALL);
        let command = if is_install {
            line.clone() + &more
        } else {
            line.clone()
        };
        let printed = run(stage, &command)?;
        eprintln!("    $ {line} ({:.1} s)", began.elapsed().as_secs_f64());
        if line.contains(doctor) {
            check_doctor(&printed)?;
        }
    }
    stage.wait_agent()?;
    eprintln!(
        "    pages are published after {:.1} s",
        began.elapsed().as_secs_f64()
    );
    Ok(())
}

/// Nothing that makes verdicts less reliable is missing.
fn check_doctor(printed: &str) -> Result<()> {
    let failed: Vec<&str> = printed
        .lines()
        .filter(|line| line.contains("FAIL"))
        .collect();
    ensure!(failed.is_empty(), "{failed:#?} in {printed}");
    Ok(())
}

/// Pod Security Admission, as the guide says.
pub fn baseline_refuses(stage: &Stage) -> Result<()> {
    let label = |level: &str| format!("pod-security.kubernetes.io/enforce={level}");
    let change = |level: &str| {
        let label = label(level);
        stage
            .kubectl()
            .run(&["label", "--overwrite", "namespace", AGENT, &label])
    };
    change("baseline")?;
    let pod = stage
        .kubectl()
        .get(&["--namespace", AGENT, &format!("daemonset/{AGENT}")])?;
    let pod = serde_json::json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": "refused", "namespace": AGENT},
        "spec": pod["spec"]["template"]["spec"],
    });
    let arguments = ["create", "--dry-run=server", "--filename=-"];
    let created = stage.kubectl().run_with_input(&arguments, &pod.to_string());
    change("privileged")?;
    match created {
        Ok(text) => bail!("the level baseline admits the agent: {text}"),
        Err(error) => {
            let why = format!("{error:#}");
            ensure!(
                ["hostPID", "hostPath", "capabilities"]
                    .iter()
                    .all(|part| why.to_lowercase().contains(&part.to_lowercase())),
                "{why}"
            );
        }
    }
    let allowed = stage.kubectl().run_with_input(&arguments, &pod.to_string());
    allowed
        .map(drop)
        .context("the level privileged refuses the agent")
}
