//! Systems of unmodified real servers, each with a fault that can be planted and removed, for scenarios, demo and tests.

mod flash_sale;
mod gunicorn;
mod iot_gridlock;
mod llm_gateway;
mod programs;
mod uvicorn;

use std::time::Duration;

pub use flash_sale::FlashSale;
pub use gunicorn::PooledApp;
pub use iot_gridlock::IotGridlock;
pub use llm_gateway::LlmGateway;
pub use programs::{Program, Session, app};
pub use uvicorn::Uvicorn;

/// Deadline of each wait.
const DEADLINE: Duration = Duration::from_secs(60);
