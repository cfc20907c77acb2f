//! Resolves the collector's URL as users write it to the exact request URL and protocol.

use std::fmt;

use http::Uri;

use super::{ConfigError, Environment, Protocol, invalid_setting, protocol};

const TRACES_PATH: &str = "/v1/traces";

/// Whether `v1/traces` is appended to the URL.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum UrlForm {
    /// Always appended.
    Base,
    /// Never appended.
    Full,
    /// Appended if missing: users paste either form.
    BaseOrFull,
}

/// An endpoint as the user wrote it, and the setting it came from.
pub struct ConfiguredUrl<'a> {
    setting: &'a str,
    url: String,
    form: UrlForm,
}

impl<'a> ConfiguredUrl<'a> {
    pub fn new(setting: &'a str, url: &str, form: UrlForm) -> Self {
        let url = url.trim().to_owned();
        Self { setting, url, form }
    }

    /// The request URL and its protocol.
    pub fn resolve(&self, env: &Environment<'_>) -> Result<(Uri, Protocol), ConfigError> {
        let wanted = protocol(env)?;
        let (scheme, rest, by_scheme) = self.scheme(wanted, env)?;
        let rest = if by_scheme && !has_port(rest) {
            with_port(rest, 4317)
        } else {
            rest.to_owned()
        };
        if rest
            .split(['/', '?'])
            .next()
            .is_some_and(|authority| authority.contains('@'))
        {
            let remedy = "credentials in a URL are not sent: set OTEL_EXPORTER_OTLP_HEADERS to authorization=…";
            return Err(invalid_setting(self.setting, remedy));
        }
        let uri: Uri = format!("{scheme}://{rest}")
            .parse()
            .map_err(|e| self.invalid_url(&e))?;
        if uri.host().is_none_or(str::is_empty) {
            return Err(self.invalid_url(&"it has no host"));
        }
        // Otherwise an invalid port would silently become the scheme's default.
        if has_port(&rest) && uri.port_u16().is_none() {
            return Err(self.invalid_url(&"its port is not a number from 1 to 65535"));
        }
        let no_path = matches!(uri.path(), "" | "/") && uri.query().is_none();
        let protocol = match wanted {
            _ if by_scheme => Protocol::Grpc,
            Some(wanted) => wanted,
            None if uri.port_u16() == Some(4317) && no_path => Protocol::Grpc,
            None => Protocol::HttpProtobuf,
        };
        match protocol {
            Protocol::Grpc if no_path => Ok((uri, protocol)),
            Protocol::Grpc => {
                let problem = format!(
                    "gRPC takes no path: use {scheme}://{}",
                    uri.authority().map_or("", |a| a.as_str())
                );
                Err(invalid_setting(self.setting, problem))
            }
            Protocol::HttpProtobuf => Ok((self.traces_url(&uri)?, protocol)),
        }
    }

    /// `http` or `https`, the rest of the URL, and whether the scheme selected gRPC.
    fn scheme(
        &self,
        wanted: Option<Protocol>,
        env: &Environment<'_>,
    ) -> Result<(&'static str, &str, bool), ConfigError> {
        let Some((scheme, rest)) = self.url.split_once("://") else {
            // The specification's default for gRPC is an encrypted connection.
            if wanted == Some(Protocol::Grpc) {
                let insecure = env
                    .signal("INSECURE")?
                    .is_some_and(|(_, is)| is.eq_ignore_ascii_case("true"));
                return Ok((if insecure { "http" } else { "https" }, &self.url, false));
            }
            return Err(
                self.invalid_url(&"it does not start with http://, https://, grpc:// or grpcs://")
            );
        };
        match scheme.to_ascii_lowercase().as_str() {
            "http" => Ok(("http", rest, false)),
            "https" => Ok(("https", rest, false)),
            "grpc" => Ok(("http", rest, true)),
            "grpcs" => Ok(("https", rest, true)),
            _ => {
                Err(self
                    .invalid_url(&"it does not start with http://, https://, grpc:// or grpcs://"))
            }
        }
    }

    fn traces_url(&self, uri: &Uri) -> Result<Uri, ConfigError> {
        let is_full = match self.form {
            UrlForm::Full => true,
            UrlForm::Base => false,
            UrlForm::BaseOrFull => uri.path().trim_end_matches('/').ends_with(TRACES_PATH),
        };
        if is_full {
            return Ok(uri.clone());
        }
        if uri.query().is_some() {
            let remedy = "a base URL cannot have a query: set the full URL in OTEL_EXPORTER_OTLP_TRACES_ENDPOINT";
            return Err(invalid_setting(self.setting, remedy));
        }
        let base = uri.to_string();
        let url = format!("{}{TRACES_PATH}", base.strip_suffix('/').unwrap_or(&base));
        url.parse().map_err(|e| self.invalid_url(&e))
    }

    fn invalid_url(&self, why: &dyn fmt::Display) -> ConfigError {
        let example = "for example http://localhost:4318, or grpc://localhost:4317";
        invalid_setting(
            self.setting,
            format!("{:?} is not a collector's URL: {why} ({example})", self.url),
        )
    }
}

/// Whether the authority at the start of `rest` has a port. An IPv6 address is in brackets.
fn has_port(rest: &str) -> bool {
    let authority = rest.split(['/', '?']).next().unwrap_or_default();
    authority
        .rsplit_once(':')
        .is_some_and(|(_, port)| !port.contains(']'))
}

fn with_port(rest: &str, port: u16) -> String {
    let end = rest.find(['/', '?']).unwrap_or(rest.len());
    format!("{}:{port}{}", &rest[..end], &rest[end..])
}
