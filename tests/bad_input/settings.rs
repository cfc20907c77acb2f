//! Invalid command lines, configuration files and environment variables.

use std::{fs, path::Path};

use anyhow::{Context as _, Result, ensure};
use tailback_tests::temp::TempDir;

use crate::{run, run_command, tailback};

#[test]
fn a_duration_without_unit_or_out_of_range_is_rejected() -> Result<()> {
    for (option, value, problem) in [
        ("--interval", "100", "100ms, 30s, 5m"),
        ("--interval", "", "100ms, 30s, 5m"),
        ("--interval", "fast", "100ms, 30s, 5m"),
        ("--interval", "100parsecs", "parsecs"),
        ("--interval", "0", "between 1ms and 60s"),
        ("--interval", "0s", "between 1ms and 60s"),
        ("--interval", "10us", "between 1ms and 60s"),
        ("--interval", "2h", "between 1ms and 60s"),
        ("--interval", "99999999999999999999s", "too large"),
        ("--duration", "30", "100ms, 30s, 5m"),
        ("--duration", "18446744073709551615s", "a hundred years"),
        ("--duration", "-5s", "100ms, 30s, 5m"),
    ] {
        let argument = format!("{option}={value}");
        run(&["run", "--all", &argument])?.check(2, &[option, problem])?;
    }
    Ok(())
}

#[test]
fn a_diagnosis_with_an_invalid_duration_is_rejected() -> Result<()> {
    for (value, problem) in [
        ("10", "100ms, 30s, 5m"),
        ("", "100ms, 30s, 5m"),
        ("soon", "100ms, 30s, 5m"),
        ("0s", "1s or more"),
        ("999ms", "1s or more"),
        ("18446744073709551615s", "a hundred years"),
    ] {
        let argument = format!("--for={value}");
        run(&["diagnose", &argument])?.check(2, &["--for", problem])?;
    }
    run(&["diagnose", "--duration", "10s"])?.check(2, &["--duration"])?;
    Ok(())
}

#[test]
fn an_invalid_configuration_is_rejected_with_line_and_key() -> Result<()> {
    let directory = TempDir::new("config")?;
    for (text, words) in [
        ("\nintervall = \"1s\"\n", ["line 2", "intervall"]),
        ("[detect.all]\nwarm = 0.5\n", ["line 2", "warm"]),
        ("[detect.acept]\nwarn = 0.5\n", ["line 1", "acept"]),
        ("interval = \"100 parsecs\"\n", ["line 1", "100ms"]),
        ("\n\ninterval = 100\n", ["line 3", "100ms"]),
        ("interval = \"0s\"\n", ["interval", "between 1ms and 60s"]),
        (
            "[detect.all]\nwindow = \"5000years\"\n",
            ["line 2", "a hundred years"],
        ),
        (
            "[detect.all]\nwarn = \"high\"\n",
            ["line 2", "expected f64"],
        ),
        ("[detect.all]\nwarn = nan\n", ["detect.all", "warn"]),
        ("[detect.all]\ncritical = nan\n", ["detect.all", "critical"]),
        ("cpu_budget = 3\n", ["cpu_budget", "0.0005"]),
        (
            "[[target]]\nservice_name = \"x\"\n",
            ["[[target]] number 1", "pid, name, port, cgroup"],
        ),
        (
            "[[target]]\npid = 1\nport = 80\n",
            ["[[target]] number 1", "more than one selector"],
        ),
        ("[[target]]\npid = -1\n", ["line 2", "-1"]),
        ("interval = \n", ["line 1", "interval"]),
        ("a = \u{1b}[2J\n", ["line 1", "TOML"]),
    ] {
        let file = directory.write("tailback.toml", text)?;
        let file = file.to_string_lossy();
        for command in ["run", "sample", "diagnose"] {
            let output = run(&[command, "--all", "--config", &file])?;
            output.check(2, &[&file])?;
            output
                .check(2, &words)
                .with_context(|| format!("for {text:?}"))?;
        }
        for action in ["check", "show"] {
            let output = run(&["config", action, &file])?;
            output
                .check(2, &words)
                .with_context(|| format!("config {action} for {text:?}"))?;
        }
    }
    Ok(())
}

#[test]
fn what_is_shown_of_a_configuration_is_valid_and_names_sources() -> Result<()> {
    let directory = TempDir::new("config")?;
    let text = "interval = \"2s\"\n[[target]]\nname = \"shop*\"\n[signal.http]\nlisten = \"127.0.0.1:9\"\n";
    let file = directory.write("tailback.toml", text)?;
    let path = file.to_string_lossy().into_owned();
    let checked = run(&["config", "check", &path])?;
    checked.check(0, &[])?;
    ensure!(
        checked.text().contains("is valid: 1 target, 1 adapter"),
        "{}",
        checked.text()
    );
    let mut show = tailback(&["config", "show", &path])?;
    show.env("RUNTIME_DIRECTORY", "/run/elsewhere");
    let shown = run_command(&mut show)?;
    shown.check(0, &[])?;
    for (setting, source) in [
        ("interval = \"2s\"", format!("# {path}:1")),
        ("name = \"shop*\"", format!("# {path}:3")),
        ("ttl = \"6s\"", "# default".to_owned()),
        (
            "directory = \"/run/elsewhere\"",
            "# $RUNTIME_DIRECTORY".to_owned(),
        ),
    ] {
        let has = |line: &String| line.starts_with(setting) && line.ends_with(&source);
        ensure!(shown.out.iter().any(has), "{setting}: {}", shown.text());
    }
    let again = directory.write("again.toml", &shown.out.join("\n"))?;
    run(&["config", "check", &again.to_string_lossy()])?.check(0, &[])
}

#[test]
fn an_invalid_log_filter_is_rejected_with_an_example() -> Result<()> {
    run(&["replay", "/no/such/file", "--log", "a=b=c"])?.check(2, &["--log", "a=b=c", "debug"])?;
    let mut command = tailback(&["replay", "/no/such/file"])?;
    command.env("TAILBACK_LOG", "a=b=c");
    run_command(&mut command)?.check(2, &["TAILBACK_LOG", "a=b=c", "debug"])
}

#[test]
fn an_unreadable_configuration_is_named() -> Result<()> {
    let directory = TempDir::new("config")?;
    let binary = directory.path().join("binary");
    fs::write(&binary, [0xff, 0xfe, 0])?;
    for (path, problem) in [
        (Path::new("/no/such/file"), "No such file"),
        (directory.path(), "Is a directory"),
        (&binary, "UTF-8"),
    ] {
        let path = path.to_string_lossy();
        let output = run(&["run", "--all", "--config", &path])?;
        output.check(2, &["cannot read the configuration", &path, problem])?;
    }
    Ok(())
}

#[test]
fn an_endpoint_that_is_not_a_url_is_rejected_with_an_example() -> Result<()> {
    for url in [
        "",
        "not a url",
        "127.0.0.1:4318",
        "ftp://127.0.0.1",
        "http://",
        "http://[::1",
        "http://a b/",
        "http://127.0.0.1:99999",
        "http://127.0.0.1:",
        "http://user:password@127.0.0.1:4318",
    ] {
        let output = run(&["run", "--all", "--duration=1s", "--otlp", url])?;
        output
            .check(2, &["--otlp"])
            .with_context(|| format!("for {url:?}"))?;
    }
    run(&["run", "--all", "--otlp", "nowhere"])?
        .check(2, &["\"nowhere\"", "http://localhost:4318"])?;

    for (variable, value) in [
        ("OTEL_EXPORTER_OTLP_ENDPOINT", "nowhere"),
        ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "nowhere"),
        ("OTEL_EXPORTER_OTLP_PROTOCOL", "carrier-pigeon"),
        ("OTEL_EXPORTER_OTLP_TIMEOUT", "soon"),
        ("OTEL_EXPORTER_OTLP_HEADERS", "a\nb"),
    ] {
        let mut command = tailback(&["run", "--all", "--duration=1s"])?;
        command
            .env("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:4318")
            .env(variable, value);
        run_command(&mut command)?.check(2, &[variable])?;
    }
    Ok(())
}
