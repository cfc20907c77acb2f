//! Devices, a broker, a consumer and a database: the database stalls, and the backlog propagates back to the devices.

use anyhow::Result;
use tailback_tests::workloads::IotGridlock;

use crate::play::{Culprit, Play};

pub fn devices(play: &mut Play) -> Result<()> {
    let devices = IotGridlock::start(300)?;
    let pids = devices.pids();
    let args: Vec<String> = pids
        .iter()
        .flat_map(|pid| ["--pid".to_owned(), pid.to_string()])
        .collect();
    play.watch(&args.iter().map(String::as_str).collect::<Vec<_>>())?;
    play.healthy()?;
    let holder = devices.lock_the_table()?;
    play.planted(Culprit::process(holder.backend));
    play.hold()?;
    play.removing(None);
    drop(holder);
    play.recover()
}
