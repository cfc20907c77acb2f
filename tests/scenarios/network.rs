//! The network carries less than the service sends.

use anyhow::Result;
use tailback_tests::{network::Network, nginx::Nginx};

use crate::{
    play::{Culprit, Play},
    programs::load,
};

pub fn limited(play: &mut Play) -> Result<()> {
    let (near, far) = (Network::new()?, Network::new()?);
    let (here, there) = near.wire(&far)?;
    let nginx = near.inside(|| Nginx::start_everywhere(1))?;
    nginx.file("large", 300_000)?;
    let to = (here, nginx.address().port()).into();
    let load = far.inside(|| load(to, "/large", 10.0))?;
    play.watch_pid(nginx.process().pid())?;
    play.healthy()?;
    play.planted(Culprit::default().or(&there.to_string()));
    near.limit_wire(Some("2mbit"))?;
    play.hold()?;
    play.removing(Some(&load));
    near.limit_wire(None)?;
    load.set_rate(3.0)?;
    play.recover()
}
