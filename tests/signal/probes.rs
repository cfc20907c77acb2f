//! Probes of the agent by an orchestrator: liveness follows its samples, readiness its pages.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use rustix::process::Signal;
use tailback_tests::{needs, wait};

use crate::stage::{DEADLINE, LONG_TTL, Stage, jam};

/// After an agent stops sampling, its liveness probe fails within this time: 10 s, and the time of a request.
const LIVENESS_BOUND: Duration = Duration::from_secs(12);

impl Stage {
    /// The status code of a GET.
    fn code(&self, path: &str) -> Result<u16> {
        let (head, _) = self.get(path)?;
        let code = head.split(' ').nth(1).unwrap_or_default();
        Ok(code.parse()?)
    }
}

#[test]
fn liveness_follows_the_samples_and_readiness_the_pages() -> Result<()> {
    const TEST: &str = "liveness_follows_the_samples_and_readiness_the_pages";
    if !needs::met(TEST, &[]) {
        return Ok(());
    }
    let service = jam("127.0.0.1:0", 0)?;
    let stage = Stage::start(service.address().port(), LONG_TTL)?;
    for path in ["/livez", "/readyz", "/readyz?target=shop"] {
        ensure!(stage.code(path)? == 200, "{path}");
    }
    ensure!(stage.code("/readyz?target=cart")? == 503);
    ensure!(
        !stage.get("/pressure")?.1.contains("agent.page"),
        "the agent's own page is listed"
    );

    // Neither depends on finding a service.
    drop(service);
    wait::until("no service", DEADLINE, || {
        Ok((stage.code("/readyz?target=shop")? == 503).then_some(()))
    })?;
    ensure!(stage.code("/livez")? == 200 && stage.code("/readyz")? == 200);

    // A stopped agent still accepts connections on its socket, and its adapter process still responds.
    let process = stage.adapter_process()?;
    stage.agent.process().signal(Signal::STOP)?;
    let stopped = Instant::now();
    wait::until("the end of liveness", LIVENESS_BOUND, || {
        Ok((stage.code("/livez")? == 503).then_some(()))
    })?;
    println!("not alive after {:?}", stopped.elapsed());
    ensure!(
        stopped.elapsed() > Duration::from_secs(8),
        "a brief pause is not the end: {:?}",
        stopped.elapsed()
    );
    ensure!(stage.code("/readyz")? == 503);
    // What load balancers ask fails open.
    ensure!(stage.code("/ready")? == 200);

    stage.agent.process().signal(Signal::CONT)?;
    wait::until("liveness", DEADLINE, || {
        let is_back = stage.code("/livez")? == 200 && stage.code("/readyz")? == 200;
        Ok(is_back.then_some(()))
    })?;
    // An agent that ends is not alive, at once.
    stage.agent.process().signal(Signal::TERM)?;
    wait::until("the end of liveness", Duration::from_secs(5), || {
        Ok((stage.code("/livez")? == 503).then_some(()))
    })?;
    ensure!(
        stage.adapter_process()? == process,
        "another adapter process"
    );
    Ok(())
}
