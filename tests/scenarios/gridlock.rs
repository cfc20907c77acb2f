//! Devices, a broker, a consumer and a database: the last stalls, and the jam grows back to the first.

use anyhow::Result;
use tailback_tests::{mosquitto::Mosquitto, postgres::Postgres};

use crate::{
    play::{Culprit, Play},
    programs::{Program, SOON, Session},
};

pub fn devices(play: &mut Play) -> Result<()> {
    let postgres = Postgres::start()?;
    postgres.run("CREATE TABLE readings (value int)")?;
    let broker = Mosquitto::start()?;
    let (broker_port, sql_port) = (broker.port().to_string(), postgres.port().to_string());
    let consumer = Program::python(
        "consumer",
        include_str!("apps/consumer.py"),
        &["paho.mqtt.client", "psycopg2"],
        &[&broker_port, &sql_port],
    )?;
    consumer.process.wait_line("subscribed", SOON)?;
    let _devices = Program::python(
        "devices",
        include_str!("apps/devices.py"),
        &["paho.mqtt.client"],
        &[&broker_port, "300"],
    )?;
    let pids = [
        broker.process().pid(),
        consumer.pid(),
        postgres.process().pid(),
    ];
    let args: Vec<String> = pids
        .iter()
        .flat_map(|pid| ["--pid".to_owned(), pid.to_string()])
        .collect();
    play.watch(&args.iter().map(String::as_str).collect::<Vec<_>>())?;
    play.healthy()?;
    let holder = Session::open(
        postgres.port(),
        &["LOCK TABLE readings IN ACCESS EXCLUSIVE MODE"],
    )?;
    play.planted(Culprit::process(holder.backend));
    play.hold()?;
    play.removing(None);
    drop(holder);
    play.recover()
}
