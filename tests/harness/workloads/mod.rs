//! Whole systems of real, stock servers with a cause that can be planted and taken away, for the scenarios, the demo and
//! the tests.

mod flash_sale;
mod iot_gridlock;
mod llm_gateway;
mod programs;
mod uvicorn;

use std::time::Duration;

pub use flash_sale::FlashSale;
pub use iot_gridlock::IotGridlock;
pub use llm_gateway::LlmGateway;
pub use programs::{Program, Session, app};
pub use uvicorn::Uvicorn;

/// What has not happened after this does not happen.
const SOON: Duration = Duration::from_secs(20);
