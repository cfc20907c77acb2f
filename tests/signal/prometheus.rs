//! A real Prometheus that scrapes a real agent: the rules, and the dashboard.

use std::{
    collections::BTreeSet,
    fs,
    io::Write as _,
    net::SocketAddr,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::Value;
use tailback_tests::{
    http,
    load::{Load, Plan, Spacing},
    needs, ports,
    process::Process,
    program,
    temp::TempDir,
    wait,
};

use crate::{
    adapters::shop,
    readers::go_program,
    stage::{DEADLINE, Stage},
};

/// How long the queries of the dashboard may take to return data: the agent reports on itself every 10 s.
const DASHBOARD_DEADLINE: Duration = Duration::from_secs(60);
/// Requests per second. Two workers that take 0.4 s for each can carry 5, so a backlog of 100 is full after 10 s, and then refuses.
const PER_S: f64 = 15.0;

pub struct Prometheus {
    process: Process,
    web: SocketAddr,
    _temp: TempDir,
}

impl Prometheus {
    /// Scrapes `metrics` every second, and evaluates our rules.
    pub fn start(metrics: SocketAddr) -> Result<Self> {
        Self::with_features(metrics, &[])
    }

    /// The same with experimental features.
    pub fn with_features(metrics: SocketAddr, features: &[&str]) -> Result<Self> {
        let temp = TempDir::new("prometheus")?;
        let web = ports::local(ports::free()?);
        let config = format!(
            "global: {{scrape_interval: 1s}}\nrule_files: ['{}']\n\
             scrape_configs: [{{job_name: tailback, static_configs: [{{targets: ['{metrics}']}}]}}]\n",
            rules().canonicalize()?.display()
        );
        let config = temp.write("prometheus.yml", &config)?;
        let data = temp.path().join("data");
        let mut command = Command::new(program::need(&["prometheus"])?);
        command
            .arg(format!("--config.file={}", config.display()))
            .arg(format!("--storage.tsdb.path={}", data.display()))
            .arg(format!("--web.listen-address={web}"));
        if !features.is_empty() {
            command.arg(format!("--enable-feature={}", features.join(",")));
        }
        let process = Process::start("Prometheus", &mut command)?;
        Ok(Self {
            process,
            web,
            _temp: temp,
        })
    }

    /// The series that a query returns now; none while Prometheus starts. An invalid query is an error.
    pub fn query(&self, query: &str) -> Result<Vec<Value>> {
        let data = self.ask(&format!("query?query={}", encoded(query)))?;
        let result = data["result"].as_array();
        Ok(result.cloned().unwrap_or_default())
    }

    /// The exemplars of the selected series.
    pub fn exemplars(&self, query: &str) -> Result<Vec<Value>> {
        // From the beginning of time to the end of this century.
        let time = "&start=0&end=4102444800";
        let data = self.ask(&format!("query_exemplars?query={}{time}", encoded(query)))?;
        let series = data.as_array().cloned().unwrap_or_default();
        let exemplars = series.iter().filter_map(|one| one["exemplars"].as_array());
        Ok(exemplars.flatten().cloned().collect())
    }

    fn ask(&self, query: &str) -> Result<Value> {
        self.process.check_running()?;
        let path = format!("/api/v1/{query}");
        let Ok(response) = http::get(self.web, &path, DEADLINE) else {
            return Ok(Value::Null);
        };
        if response.status == 503 {
            return Ok(Value::Null);
        }
        let mut response: Value = serde_json::from_slice(&response.body)?;
        ensure!(
            response["status"] == "success",
            "Prometheus rejects {query}: {}",
            response["error"]
        );
        Ok(response["data"].take())
    }

    /// The value of the first series.
    pub fn value(&self, query: &str) -> Result<Option<f64>> {
        let series = self.query(query)?;
        let value = series
            .first()
            .and_then(|series| series["value"][1].as_str());
        Ok(value.map(str::parse).transpose()?)
    }
}

/// Percent-encodes everything but letters and digits.
fn encoded(text: &str) -> String {
    text.bytes().fold(String::new(), |encoded, byte| {
        if byte.is_ascii_alphanumeric() {
            encoded + &char::from(byte).to_string()
        } else {
            encoded + &format!("%{byte:02X}")
        }
    })
}

fn deploy() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy")
}

fn rules() -> PathBuf {
    deploy().join("prometheus/rules.yml")
}

#[test]
fn the_prometheus_rules_pass_their_own_tests() -> Result<()> {
    const TEST: &str = "the_prometheus_rules_pass_their_own_tests";
    if !needs::met(TEST, &["promtool"]) {
        return Ok(());
    }
    let tests = rules().with_file_name("rules_test.yml");
    for (verb, file) in [("check", rules()), ("test", tests)] {
        let output = Command::new(program::need(&["promtool"])?)
            .args([verb, "rules"])
            .arg(file)
            .output()?;
        ensure!(
            output.status.success(),
            "promtool {verb}: {}{}",
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        );
    }
    Ok(())
}

fn dashboard() -> Result<String> {
    let path = deploy().join("grafana/tailback.json");
    fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))
}

/// Each query of the dashboard with its panel, as Grafana sends it with every variable at "All".
fn queries(dashboard: &Value) -> Result<Vec<(String, String)>> {
    let mut queries = Vec::new();
    let panels = dashboard["panels"].as_array().context("no panels")?;
    for panel in panels.iter().filter(|panel| panel["type"] != "row") {
        let title = panel["title"].as_str().context("a panel has no title")?;
        let targets = panel["targets"].as_array().context("no queries")?;
        ensure!(!targets.is_empty(), "{title} has no query");
        for target in targets {
            let query = target["expr"].as_str().context("no expression")?;
            queries.push((title.to_owned(), with_values(query)?));
        }
    }
    let variables = dashboard["templating"]["list"].as_array();
    for variable in variables.context("no variables")? {
        let Some(definition) = variable["definition"].as_str() else {
            continue;
        };
        // label_values(SELECTOR, LABEL)
        let inner = definition
            .strip_prefix("label_values(")
            .and_then(|rest| rest.strip_suffix(')'));
        let (selector, label) = inner
            .and_then(|inner| inner.rsplit_once(", "))
            .with_context(|| format!("{definition} is no label_values"))?;
        let title = format!("variable {}", variable["name"]);
        queries.push((
            title,
            with_values(&format!("count by ({label}) ({selector})"))?,
        ));
    }
    Ok(queries)
}

fn with_values(query: &str) -> Result<String> {
    let mut query = query.replace("$__rate_interval", "5s");
    query = query.replace("$__range", "1m");
    for name in ["instance", "target", "kind"] {
        query = query.replace(&format!("${name}"), ".*");
    }
    ensure!(!query.contains('$'), "an unknown variable in {query}");
    Ok(query)
}

#[test]
fn every_query_of_the_dashboard_returns_data_while_a_service_is_overloaded() -> Result<()> {
    const TEST: &str = "every_query_of_the_dashboard_returns_data_while_a_service_is_overloaded";
    if !needs::met(TEST, &["prometheus", "uwsgi-core"]) {
        return Ok(());
    }
    let dashboard: Value = serde_json::from_str(&dashboard()?)?;
    let mut missing = queries(&dashboard)?;
    let count = missing.len();
    ensure!(count > 40, "only {count} queries");
    let temp = TempDir::new("dashboard")?;
    let slow = temp.path().join("slow");
    fs::write(&slow, "")?;
    let service = shop(&slow)?;
    let more = format!(
        "[[signal.haproxy]]\ntarget = \"shop\"\nlisten = \"127.0.0.1:{}\"\n",
        ports::free()?
    );
    let target = format!(
        "[[target]]\nport = {}\nservice_name = \"shop\"\n",
        service.port()
    );
    // Without hooks there are no exact waits.
    let hooks = "tier = \"watch\"\nhook_budget = 0.5\n";
    let stage = Stage::start_with(TempDir::new("signal")?, |temp, base| {
        let text = format!("{hooks}{target}{base}{more}");
        temp.write("tailback.toml", &text)
    })?;
    let prometheus = Prometheus::start(stage.http)?;
    let load = Load::start(Plan {
        to: service.address(),
        path: "/".to_owned(),
        per_s: PER_S,
        spacing: Spacing::Even,
        duration: 2 * DASHBOARD_DEADLINE,
        timeout: DASHBOARD_DEADLINE,
        max_in_flight: 1_000,
    })?;
    let mut causes = BTreeSet::new();
    // Some facts hold only while the queue fills, others only once it is full.
    let all = wait::until_ok("data for every query", DASHBOARD_DEADLINE, || {
        let mut left = Vec::new();
        // A copy: after an error, for example of an invalid query, `missing` still has every query that is left.
        for (title, query) in missing.clone() {
            let series = match prometheus.query(&query) {
                Ok(series) => series,
                Err(error) => bail!("{title}: {error:#}"),
            };
            let labels = series
                .iter()
                .filter_map(|one| one["metric"]["cause"].as_str());
            causes.extend(labels.map(str::to_owned));
            if series.is_empty() {
                left.push((title, query));
            }
        }
        missing = left;
        ensure!(missing.is_empty(), "no data for {missing:#?}");
        Ok(())
    });
    let stopped = load.stop();
    all?;
    stopped?;
    println!("{count} queries returned data; causes: {causes:?}");
    ensure!(!causes.is_empty());
    Ok(())
}

#[test]
fn the_dashboard_is_valid_by_the_types_of_grafanas_schema() -> Result<()> {
    const TEST: &str = "the_dashboard_is_valid_by_the_types_of_grafanas_schema";
    if !needs::met(TEST, &["go"]) {
        return Ok(());
    }
    let temp = TempDir::new("schema")?;
    let module = Path::new(env!("CARGO_MANIFEST_DIR")).join("signal/grafana");
    let check = go_program(&module, ".", &temp.path().join("check"))?;
    let errors = |text: &str| -> Result<Option<String>> {
        let mut child = Command::new(&check)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()?;
        let mut input = child.stdin.take().context("no standard input")?;
        input.write_all(text.as_bytes())?;
        drop(input);
        let output = child.wait_with_output()?;
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        Ok((!output.status.success()).then_some(error))
    };
    let dashboard = dashboard()?;
    ensure!(errors(&dashboard)?.is_none(), "{:?}", errors(&dashboard)?);
    // The check sees faults in the dashboard, in the options of a panel and in a query.
    for (right, wrong) in [
        ("\"schemaVersion\": 39", "\"schemaVersion\": \"39\""),
        ("\"templating\"", "\"templates\""),
        ("\"rowHeight\"", "\"rowHigh\""),
        ("\"legendFormat\"", "\"legend\""),
    ] {
        let faulty = dashboard.replacen(right, wrong, 1);
        ensure!(faulty != dashboard, "no {right}");
        ensure!(errors(&faulty)?.is_some(), "{wrong} is accepted");
    }
    Ok(())
}
