//! The cluster with the services that Tailback watches, under load, and a collector.

use std::{
    cell::RefCell,
    fs,
    net::{IpAddr, SocketAddr},
    path::Path,
    process::Command,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use tailback_tests::{
    http,
    jaeger::Jaeger,
    load::{Load, Plan, Spacing},
    process::Process,
    wait,
};

use crate::{
    cluster::{Cluster, given},
    config::NODE_ADDRESS,
    kubectl::Kubectl,
};

/// Deadline of each wait: for pods to start, for verdicts, for the kubelet.
pub const DEADLINE: Duration = Duration::from_secs(90);
/// Namespace of the services.
pub const NAMESPACE: &str = "shop";
/// Namespace and name of the release.
pub const AGENT: &str = "tailback";
/// Port of the agent's HTTP adapter, as the chart has it.
pub const HTTP_PORT: u16 = 9400;
/// Port of the services.
const PORT: u16 = 8080;
/// The reader of the page in the services' image.
pub const POD_PROGRAM: &str = "/usr/bin/pod";
/// Where the logs of failed checks are kept, below the working directory.
const LOGS: &str = "target/cluster";
/// The load lasts until the end.
const LOAD_DURATION: Duration = Duration::from_secs(3_600);

/// A service: its pod, what it does, its CPU limit, and the requests per second that it gets.
struct Service {
    pod: &'static str,
    arguments: &'static [&'static str],
    cpu_limit: Option<&'static str>,
    per_s: f64,
}

/// `jammed` waits for `slow`, whose own workers sleep for longer than requests come.
const SERVICES: [Service; 4] = [
    Service {
        pod: "throttled",
        arguments: &["compute", "15"],
        cpu_limit: Some("200m"),
        per_s: 20.0,
    },
    Service {
        pod: "slow",
        arguments: &["sleep", "500"],
        cpu_limit: None,
        per_s: 0.0,
    },
    Service {
        pod: "jammed",
        arguments: &["relay"],
        cpu_limit: None,
        per_s: 8.0,
    },
    Service {
        pod: "healthy",
        arguments: &["compute", "5"],
        cpu_limit: None,
        per_s: 5.0,
    },
];

pub struct Stage {
    // Dropped in this order.
    loads: RefCell<Vec<Load>>,
    pub collector: Jaeger,
    cluster: Cluster,
}

impl Stage {
    pub fn start() -> Result<Self> {
        let cluster = Cluster::start()?;
        let collector = Jaeger::start_at(node_address()?)?;
        let stage = Self {
            loads: RefCell::default(),
            collector,
            cluster,
        };
        stage.kubectl().run(&["create", "namespace", NAMESPACE])?;
        stage.wait_account(NAMESPACE)?;
        for service in &SERVICES {
            let manifest = stage.manifest(service)?;
            stage
                .kubectl()
                .run_with_input(&["apply", "--filename=-"], &manifest)?;
            let address = stage.wait_pod(NAMESPACE, service.pod)?;
            if service.per_s > 0.0 {
                stage.load(address, service.per_s)?;
            }
        }
        Ok(stage)
    }

    pub fn kubectl(&self) -> &Kubectl {
        self.cluster.kubectl()
    }

    pub fn end(self) -> Result<()> {
        let Self {
            loads,
            collector,
            cluster,
        } = self;
        drop((loads, collector));
        cluster.end()
    }

    /// Sends requests to the service at this address until the end.
    pub fn load(&self, to: IpAddr, per_s: f64) -> Result<()> {
        let load = Load::start(Plan {
            to: SocketAddr::new(to, PORT),
            path: "/".to_owned(),
            per_s,
            spacing: Spacing::Poisson { seed: 7 },
            duration: LOAD_DURATION,
            timeout: Duration::from_secs(30),
            max_in_flight: 60,
        })?;
        self.loads.borrow_mut().push(load);
        Ok(())
    }

    /// Pods need the account, which the controller manager creates.
    pub fn wait_account(&self, namespace: &str) -> Result<()> {
        wait::until_ok("the service account", DEADLINE, || {
            let account = ["serviceaccount", "default", "--namespace", namespace];
            self.kubectl().get(&account).map(drop)
        })
    }

    /// Waits until the containers of a pod have started. Returns its address.
    pub fn wait_pod(&self, namespace: &str, name: &str) -> Result<IpAddr> {
        let pod = format!("pod/{name}");
        self.kubectl().run(&[
            "--namespace",
            namespace,
            "wait",
            "--for=condition=Ready",
            &pod,
            &format!("--timeout={}s", DEADLINE.as_secs()),
        ])?;
        let address = self
            .kubectl()
            .field(&["--namespace", namespace, &pod], "{.status.podIP}")?;
        address
            .parse()
            .with_context(|| format!("the address {address:?}"))
    }

    /// The pod, which mounts its own page.
    fn manifest(&self, service: &Service) -> Result<String> {
        let mut arguments: Vec<String> =
            service.arguments.iter().map(ToString::to_string).collect();
        if service.pod == "jammed" {
            let slow = self.wait_pod(NAMESPACE, "slow")?;
            arguments.push(SocketAddr::new(slow, PORT).to_string());
        }
        let mut resources = json!({"requests": {"cpu": "10m"}});
        if let Some(limit) = service.cpu_limit {
            resources["limits"] = json!({"cpu": limit});
        }
        let field = |name: &str, path: &str| json!({"name": name, "valueFrom": {"fieldRef": {"fieldPath": path}}});
        let pod = json!({
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": service.pod, "namespace": NAMESPACE},
            "spec": {
                "automountServiceAccountToken": false,
                "terminationGracePeriodSeconds": 1,
                "securityContext": {"runAsUser": 1000, "runAsNonRoot": true},
                "containers": [{
                    "name": "web",
                    "image": "registry.example/shop:1",
                    "args": arguments,
                    "resources": resources,
                    "env": [field("NAMESPACE", "metadata.namespace"), field("POD", "metadata.name")],
                    "volumeMounts": [{
                        "name": "pages", "mountPath": "/run/tailback", "readOnly": true,
                        "subPathExpr": "pods/$(NAMESPACE)_$(POD)_web",
                    }],
                }],
                // These pods are older than the agent, which would have made the directory.
                "volumes": [{"name": "pages", "hostPath": {"path": "/run/tailback", "type": "DirectoryOrCreate"}}],
            },
        });
        Ok(pod.to_string())
    }

    /// The only pod of the agent that is not about to end.
    pub fn agent(&self) -> Result<Agent> {
        let selector = format!("--selector=app.kubernetes.io/instance={AGENT}");
        let pods = self
            .kubectl()
            .get(&["--namespace", AGENT, "pods", &selector])?;
        let pods = pods["items"].as_array().context("a list of pods")?;
        let mut living = pods
            .iter()
            .filter(|pod| pod["metadata"]["deletionTimestamp"].is_null());
        let pod = living.next().context("no pod of the agent")?;
        ensure!(living.next().is_none(), "several pods of the agent");
        Agent::of(pod)
    }

    /// Waits until an agent samples and publishes.
    pub fn wait_agent(&self) -> Result<Agent> {
        wait::until_ok("the agent to publish", DEADLINE, || {
            let agent = self.agent()?;
            let (code, body) = agent.get("/readyz")?;
            ensure!(code == 200, "{code} {body}");
            let status = agent.status()?;
            ensure!(
                status["agent"]["pages"]["written"].as_u64() > Some(0),
                "{status}"
            );
            Ok(agent)
        })
    }

    /// Runs `tailback` in the agent's container.
    pub fn tailback(&self, arguments: &[&str]) -> Result<String> {
        let command = [&["/usr/bin/tailback"], arguments].concat();
        let pod = format!("pod/{}", self.agent()?.pod);
        self.kubectl().exec(AGENT, &[&pod], &command)
    }

    /// The page of a service, as it is read in its own pod.
    pub fn page(&self, pod: &str) -> Result<Value> {
        let command = [POD_PROGRAM, "page", "/run/tailback/page"];
        let text = self.kubectl().exec(NAMESPACE, &[pod], &command)?;
        serde_json::from_str(&text).with_context(|| format!("read {text:?}"))
    }

    /// Reads the page of a service in its own pod, until the reader is dropped.
    pub fn watch(&self, pod: &str) -> Result<Watch> {
        let mut command = self.kubectl().kubectl();
        command.args(["--namespace", NAMESPACE, "exec", pod, "--"]);
        command.args([POD_PROGRAM, "watch", "/run/tailback/page"]);
        let process = Process::start("the reader of the page", &mut command)?;
        process.wait_line("\"alive\":true", DEADLINE)?;
        Ok(Watch { process })
    }

    /// Keeps what explains a failure.
    pub fn save_logs(&self, check: &str) {
        let directory = Path::new(LOGS).join(check);
        let save = || -> Result<()> {
            fs::create_dir_all(&directory)?;
            for (name, text) in self.cluster.logs() {
                fs::write(directory.join(format!("{name}.log")), text)?;
            }
            let selector = format!("--selector=app.kubernetes.io/instance={AGENT}");
            for (name, arguments) in [
                ("pods", &["describe", "pods", "--all-namespaces"][..]),
                ("events", &["get", "events", "--all-namespaces"]),
                (
                    "agent",
                    &[
                        "--namespace",
                        AGENT,
                        "logs",
                        "--prefix",
                        "--tail=-1",
                        &selector,
                    ],
                ),
            ] {
                let text = self.kubectl().run(arguments);
                let text = text.unwrap_or_else(|error| format!("{error:#}"));
                fs::write(directory.join(format!("{name}.txt")), text)?;
            }
            Ok(())
        };
        match save() {
            Ok(()) => eprintln!("logs are in {}", directory.display()),
            Err(error) => eprintln!("warning: no logs in {}: {error:#}", directory.display()),
        }
    }
}

/// A pod of the agent.
#[derive(Clone)]
pub struct Agent {
    pub pod: String,
    pub restarts: u64,
    address: IpAddr,
}

impl Agent {
    fn of(pod: &Value) -> Result<Self> {
        let text = |value: &Value| value.as_str().map(str::to_owned);
        let status = &pod["status"];
        let address = status["podIP"].as_str().context("no address yet")?;
        Ok(Self {
            pod: text(&pod["metadata"]["name"]).context("a name")?,
            restarts: status["containerStatuses"][0]["restartCount"]
                .as_u64()
                .context("no container yet")?,
            address: address.parse()?,
        })
    }

    pub fn address(&self, port: u16) -> SocketAddr {
        SocketAddr::new(self.address, port)
    }

    /// Status code and body of a response of its HTTP adapter.
    pub fn get(&self, path: &str) -> Result<(u16, String)> {
        let response = http::get(self.address(HTTP_PORT), path, Duration::from_secs(5))?;
        Ok((response.status, String::from_utf8(response.body)?))
    }

    pub fn status(&self) -> Result<Value> {
        let (_, body) = self.get("/status")?;
        serde_json::from_str(&body).with_context(|| format!("read {body:?}"))
    }

    /// A process of the agent, by its key in the status. With `hostPID` its pid is that of the machine.
    pub fn pid(&self, of: &str) -> Result<u32> {
        let status = self.status()?;
        let pid = status[of]["pid"].as_u64();
        Ok(u32::try_from(
            pid.with_context(|| format!("no pid of {of} in {status}"))?,
        )?)
    }
}

/// A reader in a pod that reads its page all the time.
pub struct Watch {
    process: Process,
}

impl Watch {
    /// The last report of the reader.
    pub fn report(&self) -> Result<Value> {
        self.process.check_running()?;
        let lines = self.process.lines().all();
        let last = lines.last().context("no report")?;
        serde_json::from_str(&last.text).with_context(|| format!("read {:?}", last.text))
    }

    /// The longest time for which the page had expired.
    pub fn longest_expired(&self) -> Result<Duration> {
        let report = self.report()?;
        let ms = report["longest_ms"].as_u64().context("no time")?;
        Ok(Duration::from_millis(ms))
    }

    /// Waits for a report that the page has expired, or is renewed again. Only reports after the first `mark` count.
    pub fn wait(&self, is_alive: bool, mark: usize) -> Result<Value> {
        let what = if is_alive {
            "a renewed page"
        } else {
            "an expired page"
        };
        self.process.lines().wait(what, mark, DEADLINE, |line| {
            let report: Value = serde_json::from_str(&line.text).ok()?;
            (report["alive"] == is_alive).then_some(report)
        })
    }

    /// Number of reports so far.
    pub fn mark(&self) -> usize {
        self.process.lines().count()
    }
}

fn node_address() -> Result<IpAddr> {
    Ok(NODE_ADDRESS.parse()?)
}

/// The agent on the node itself, without a container.
pub fn host_agent() -> Result<Command> {
    Ok(Command::new(given("TAILBACK_BIN")?))
}
