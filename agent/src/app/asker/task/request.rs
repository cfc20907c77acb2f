//! The requests of a preset to one listener, each by its protocol.

use std::collections::BTreeSet;

use anyhow::{Context as _, Result, bail, ensure};

use super::{Asked, Proved, Session};
use crate::{
    app::{
        asker::Login,
        exposition, json, lines,
        series::SeriesSet,
        table::{Ask, Preset},
        transport::{Endpoint, Password, TooLarge, http, line, postgres, redis, resp},
    },
    text::harmless,
};

/// A connection that is kept between requests, of the protocols that have sessions.
pub(super) enum Client {
    None,
    Redis(resp::Client),
    Postgres(postgres::Client),
}

impl Client {
    /// The same, unless the service has closed it.
    pub(super) fn if_open(self) -> Self {
        let is_open = match &self {
            Self::None => false,
            Self::Redis(client) => client.is_open(),
            Self::Postgres(client) => client.is_open(),
        };
        if is_open { self } else { Self::None }
    }
}

/// What is kept from one answer to the next, whatever becomes of the connection.
#[derive(Default)]
pub(super) struct Kept {
    redis: redis::State,
    /// Optional requests whose answers were too large, by their place in the preset.
    left_out: BTreeSet<usize>,
}

impl Asked {
    pub(super) async fn ask_at(
        &self,
        endpoint: &Endpoint,
        path: usize,
        client: Client,
    ) -> Result<Proved> {
        let preset = &self.process.preset;
        let (answer, client) = self.request(endpoint, path, client).await?;
        ensure!(
            answer.has(&preset.proof),
            "the answer lacks {}: it is not {}",
            preset.proof,
            preset.name
        );
        Ok(Proved {
            session: Session {
                endpoint: endpoint.clone(),
                path,
                client,
            },
            answer,
        })
    }

    /// All requests of the preset, one after the other.
    async fn request(
        &self,
        endpoint: &Endpoint,
        path: usize,
        mut client: Client,
    ) -> Result<(SeriesSet, Client)> {
        let from = &self.origin;
        let names = &self.names;
        let mut kept = self.kept.lock().await;
        let mut http = None;
        let mut all = SeriesSet::default();
        for (index, ask) in self.process.preset.ask.iter().enumerate() {
            if kept.left_out.contains(&index) {
                continue;
            }
            match ask {
                Ask::Prometheus {
                    unless: Some(name), ..
                } if all.has(name) => {}
                Ask::Prometheus { optional, .. } | Ask::Json { optional, .. } => {
                    let mut open = match http.take().filter(http::Client::is_open) {
                        Some(open) => open,
                        None => http::Client::connect(endpoint, from).await?,
                    };
                    match self.get(&mut open, ask, path).await {
                        Ok(answer) => {
                            all.append(answer);
                            http = Some(open);
                        }
                        Err(error) if *optional && error.is::<TooLarge>() => {
                            kept.left_out.insert(index);
                            let why = harmless(&format!("{error:#}"));
                            self.report(|report| report.missing = Some(why));
                        }
                        Err(error) => return Err(error),
                    }
                }
                Ask::Csv {
                    command,
                    table,
                    labels,
                } => {
                    let text = line::ask(endpoint, from, command).await?;
                    all.append(lines::csv(&text, table, labels, names));
                }
                Ask::Pairs { command, table } => {
                    let text = line::ask(endpoint, from, command).await?;
                    all.append(lines::pairs(&text, table, names));
                }
                Ask::Postgres {
                    user: usual_user,
                    database,
                    query,
                    table,
                    labels,
                } => {
                    let mut session = match client {
                        Client::Postgres(session) => session,
                        _ => {
                            let user = self.login().and_then(|login| login.user.as_ref());
                            let place = (user.unwrap_or(usual_user).as_str(), database.as_str());
                            let password = self.password().await?;
                            postgres::Client::connect(endpoint, from, place, password.as_ref())
                                .await?
                        }
                    };
                    all.append(session.query(query, (table, labels), names).await?);
                    client = Client::Postgres(session);
                }
                // All of them at once, below.
                Ask::Redis { .. } => {}
            }
        }
        let asks = &self.process.preset.ask;
        if asks.iter().any(|ask| matches!(ask, Ask::Redis { .. })) {
            let mut session = match client {
                Client::Redis(session) => session,
                _ => {
                    let password = self.password().await?;
                    let user = self.login().and_then(|login| login.user.as_deref());
                    let user = user.unwrap_or("default");
                    let login = password.as_ref().map(|password| (user, password));
                    resp::Client::connect(endpoint, from, login).await?
                }
            };
            all.append(redis::ask(&mut session, asks, &mut kept.redis, names).await?);
            // Its replies have been used.
            session.begin();
            client = Client::Redis(session);
        }
        Ok((all, client))
    }

    /// The values of one HTTP request.
    async fn get(&self, http: &mut http::Client, ask: &Ask, path: usize) -> Result<SeriesSet> {
        match ask {
            Ask::Prometheus { paths, .. } => {
                let path = paths.get(path).or(paths.last()).context("no path")?;
                Ok(exposition::parse(&http.get(path).await?, &self.names))
            }
            Ask::Json {
                path,
                table,
                rename,
                labels,
                ..
            } => json::parse(&http.get(path).await?, table, rename, labels, &self.names),
            _ => bail!("not a request by HTTP"),
        }
    }

    /// The login, if this process may receive it.
    fn login(&self) -> Option<&Login> {
        let login = self.context.logins.get(&self.process.preset.name)?;
        (self.process.uid == Some(login.process_user)).then_some(login)
    }

    /// Its password. The file is read on another thread: its file system may not answer.
    async fn password(&self) -> Result<Option<Password>> {
        let Some(login) = self.login().cloned() else {
            return Ok(None);
        };
        let only = login.process_user;
        let text = self.origin.run_blocking(move || login.password()).await?;
        Ok(Some(Password { only, text }))
    }
}

/// How many paths a preset tries at each listener.
pub(super) fn paths(preset: &Preset) -> usize {
    let paths = preset.ask.iter().map(|ask| match ask {
        Ask::Prometheus { paths, .. } => paths.len(),
        _ => 1,
    });
    paths.max().unwrap_or(1)
}
