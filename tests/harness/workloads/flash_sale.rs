//! A shop with one popular item: every request updates the same row.

use anyhow::Result;

use super::{Session, app};
use crate::{
    postgres::Postgres,
    uwsgi::{App, Uwsgi},
};

/// Decrements the stock of the item.
const TAKE: &str = "UPDATE stock SET left_over = left_over - 1 WHERE item = 1";

/// uWSGI in front of PostgreSQL.
pub struct FlashSale {
    pub uwsgi: Uwsgi,
    pub postgres: Postgres,
}

impl FlashSale {
    /// Path of a request.
    pub const PATH: &str = "/sell/1";

    pub fn start(workers: u32, backlog: u32) -> Result<Self> {
        let postgres = Postgres::start()?;
        postgres.run(
            "CREATE TABLE stock (item int PRIMARY KEY, left_over int);
             INSERT INTO stock VALUES (1, 1000000)",
        )?;
        let uwsgi = Uwsgi::start_app(&App {
            env: vec![
                ("APP_SQL_PORT", postgres.port().to_string()),
                ("APP_SQL", TAKE.to_owned()),
            ],
            ..app(workers, backlog)
        })?;
        Ok(Self { uwsgi, postgres })
    }

    /// Plants the fault: a session updates the row and does not commit.
    pub fn hold_the_row(&self) -> Result<Session> {
        Session::open(self.postgres.port(), &[TAKE])
    }
}
