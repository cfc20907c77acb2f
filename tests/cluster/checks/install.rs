//! The commands of docs/guides/kubernetes.md, as they are written there.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::Command,
    time::Instant,
};

use anyhow::{Context as _, Result, bail, ensure};
use tailback_tests::pty::Pty;

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
/// What commands have that are used on a terminal.
const ON_TERMINAL: &str = "exec -it ";
/// The size of that terminal.
const COLUMNS: u16 = 100;
const ROWS: u16 = 30;
/// On the screen of such a command: how to quit.
const QUIT: &str = "q quit";

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

/// A shell that runs a line of the guide.
fn shell(stage: &Stage, line: &str) -> Result<Command> {
    let mut path = vec![stage.kubectl().directory().to_owned()];
    path.push(helm()?.parent().context("a directory")?.to_owned());
    path.extend(env::split_paths(&env::var_os("PATH").unwrap_or_default()));
    let mut shell = stage.kubectl().command("timeout");
    // Else `timeout` would take the terminal away from its command.
    shell
        .args([
            "--foreground",
            &DEADLINE.as_secs().to_string(),
            "sh",
            "-ec",
            line,
        ])
        .env("PATH", env::join_paths(path)?)
        .current_dir(repository());
    Ok(shell)
}

/// Runs a line that takes over the terminal, and quits.
fn run_on_terminal(stage: &Stage, line: &str) -> Result<()> {
    let mut shell = shell(stage, line)?;
    let mut pty = Pty::start(shell.env("TERM", "xterm-256color"), COLUMNS, ROWS)?;
    pty.wait(QUIT)?;
    pty.write("q")?;
    let code = pty.wait_end()?;
    ensure!(code == Some(0), "exit code {code:?}:\n{}", pty.screen());
    Ok(())
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
        if line.contains(ON_TERMINAL) {
            run_on_terminal(stage, &command)?;
        } else {
            let printed = output(&mut shell(stage, &command)?)?;
            if line.contains(doctor) {
                check_doctor(&printed)?;
            }
        }
        eprintln!("    $ {line} ({:.1} s)", began.elapsed().as_secs_f64());
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
