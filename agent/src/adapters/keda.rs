//! An external scaler for KEDA (`externalscaler.ExternalScaler`): how many instances' work is asked of a service.
//!
//! The metric is the sum of the loads of the instances on this node, or their mean; KEDA divides it by what one is to carry. When nothing is
//! known it says so instead of a number: KEDA then leaves things as they are, or goes by the fallback of the ScaledObject.

use std::{collections::HashMap, sync::Arc, time::Duration};

use http::{Request, Response};
use hyper::body::Incoming;
use tokio_stream::{StreamExt as _, wrappers::IntervalStream};
use tonic::{Status, body::Body, server::Grpc};
use tonic_prost::ProstCodec;

use super::{Shared, adapter_stats::AdapterStats, clock, grpc, listen::Door};
use crate::signal::names::directory_of;

const SERVICE: &str = "/externalscaler.ExternalScaler/";
const METRIC: &str = "tailback_load";
/// What one instance is to carry, unless `targetLoad` says something else.
const TARGET_LOAD: f64 = 0.8;
const EVERY: Duration = Duration::from_secs(1);

#[derive(Clone, PartialEq, prost::Message)]
struct ScaledObjectRef {
    #[prost(string, tag = "1")]
    name: String,
    #[prost(string, tag = "2")]
    namespace: String,
    #[prost(map = "string, string", tag = "3")]
    scaler_metadata: HashMap<String, String>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct IsActiveResponse {
    #[prost(bool, tag = "1")]
    result: bool,
}

#[derive(Clone, PartialEq, prost::Message)]
struct GetMetricSpecResponse {
    #[prost(message, repeated, tag = "1")]
    metric_specs: Vec<MetricSpec>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct MetricSpec {
    #[prost(string, tag = "1")]
    metric_name: String,
    /// Of before there were fractions.
    #[prost(int64, tag = "2")]
    target_size: i64,
    #[prost(double, tag = "3")]
    target_size_float: f64,
}

#[derive(Clone, PartialEq, prost::Message)]
struct GetMetricsRequest {
    #[prost(message, optional, tag = "1")]
    scaled_object_ref: Option<ScaledObjectRef>,
    #[prost(string, tag = "2")]
    metric_name: String,
}

#[derive(Clone, PartialEq, prost::Message)]
struct GetMetricsResponse {
    #[prost(message, repeated, tag = "1")]
    metric_values: Vec<MetricValue>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct MetricValue {
    #[prost(string, tag = "1")]
    metric_name: String,
    /// Of before there were fractions.
    #[prost(int64, tag = "2")]
    metric_value: i64,
    #[prost(double, tag = "3")]
    metric_value_float: f64,
}

/// What a ScaledObject asks for.
#[derive(Debug, PartialEq)]
struct Wanted {
    target: String,
    target_load: f64,
    /// Of all instances here, for `AverageValue`; or the mean, for `Value`: instances elsewhere are taken to be like these.
    is_mean: bool,
    /// Active above this; without it, while an instance is there.
    activation_load: Option<f64>,
}

impl Wanted {
    fn of(object: &ScaledObjectRef) -> Result<Self, Status> {
        let metadata = &object.scaler_metadata;
        let number = |key: &str| match metadata.get(key) {
            None => Ok(None),
            Some(text) => match text.parse::<f64>() {
                Ok(number) if number > 0.0 && number.is_finite() => Ok(Some(number)),
                _ => Err(Status::invalid_argument(format!(
                    "{key}: {text:?} is no number above 0, such as \"0.8\""
                ))),
            },
        };
        let target = metadata.get("target").filter(|target| !target.is_empty());
        let target = target.ok_or_else(|| {
            Status::invalid_argument(
                "the trigger's metadata has no target: the name of the service, as `tailback status` shows it",
            )
        })?;
        Ok(Self {
            target: target.clone(),
            is_mean: match metadata.get("metric").map_or("sum", String::as_str) {
                "sum" => false,
                "mean" => true,
                other => {
                    return Err(Status::invalid_argument(format!(
                        "metric: {other:?} is neither \"sum\" (of all instances on this node; metricType AverageValue) nor \"mean\" (metricType Value)"
                    )));
                }
            },
            target_load: number("targetLoad")?.unwrap_or(TARGET_LOAD),
            activation_load: number("activationLoad")?,
        })
    }

    /// Of its instances on this node.
    fn load(&self, shared: &Shared) -> Result<f64, Status> {
        let name = directory_of(&self.target);
        let loads: Vec<f64> = shared
            .book
            .alive(|of| is_instance(of, &name))
            .into_iter()
            .filter(|(_, pressure)| pressure.pid != 0)
            .map(|(_, pressure)| pressure.load)
            .collect();
        if loads.is_empty() {
            return Err(Status::unavailable(format!(
                "nothing is known of {:?} on this node: no such service is watched, or the agent is gone",
                self.target
            )));
        }
        let sum: f64 = loads.iter().sum();
        Ok(if self.is_mean {
            sum / loads.len() as f64
        } else {
            sum
        })
    }

    fn is_active(&self, shared: &Shared) -> Result<IsActiveResponse, Status> {
        let load = self.load(shared)?;
        let result = self.activation_load.is_none_or(|least| load > least);
        Ok(IsActiveResponse { result })
    }

    fn spec(&self) -> GetMetricSpecResponse {
        let spec = MetricSpec {
            metric_name: METRIC.to_owned(),
            target_size: self.target_load.ceil() as i64,
            target_size_float: self.target_load,
        };
        GetMetricSpecResponse {
            metric_specs: vec![spec],
        }
    }
}

fn metrics(load: f64) -> GetMetricsResponse {
    let value = MetricValue {
        metric_name: METRIC.to_owned(),
        metric_value: load.ceil() as i64,
        metric_value_float: load,
    };
    GetMetricsResponse {
        metric_values: vec![value],
    }
}

/// Of several services of one name the others have their pid behind it.
fn is_instance(directory: &str, name: &str) -> bool {
    match directory.strip_prefix(name) {
        Some("") => true,
        Some(rest) => rest
            .strip_prefix('@')
            .is_some_and(|pid| pid.parse::<u32>().is_ok()),
        None => false,
    }
}

/// Serves until dropped.
pub async fn serve(door: Door, shared: Arc<Shared>) {
    let tally = door.tally();
    grpc::serve(door, move |request| {
        answer(request, Arc::clone(&shared), Arc::clone(&tally))
    })
    .await;
}

async fn answer(
    request: Request<Incoming>,
    shared: Arc<Shared>,
    tally: Arc<AdapterStats>,
) -> Response<Body> {
    let path = request.uri().path().to_owned();
    match path.strip_prefix(SERVICE) {
        Some("IsActive") => {
            unary(request, tally, move |object: &ScaledObjectRef| {
                let active = Wanted::of(object)?.is_active(&shared)?;
                Ok((format!("active: {}", active.result), active))
            })
            .await
        }
        Some("GetMetricSpec") => {
            unary(request, tally, |object: &ScaledObjectRef| {
                let wanted = Wanted::of(object)?;
                Ok((format!("target load {}", wanted.target_load), wanted.spec()))
            })
            .await
        }
        Some("GetMetrics") => {
            unary(request, tally, move |asked: &GetMetricsRequest| {
                let object = asked.scaled_object_ref.clone().unwrap_or_default();
                let load = Wanted::of(&object)?.load(&shared)?;
                Ok((format!("load {load:.2}"), metrics(load)))
            })
            .await
        }
        Some("StreamIsActive") => stream_is_active(request, shared, tally).await,
        _ => grpc::no_such_method(&path),
    }
}

/// `answer` gives what to say of the answer, too.
async fn unary<Q, A>(
    request: Request<Incoming>,
    tally: Arc<AdapterStats>,
    answer: impl Fn(&Q) -> Result<(String, A), Status>,
) -> Response<Body>
where
    Q: prost::Message + Default + Send + 'static,
    A: prost::Message + Send + 'static,
{
    let service = tower::service_fn(|request: tonic::Request<Q>| {
        let answer = answer(request.get_ref());
        tally.said(match &answer {
            Ok((said, _)) => said,
            Err(status) => status.message(),
        });
        std::future::ready(answer.map(|(_, answer)| tonic::Response::new(answer)))
    });
    Grpc::new(ProstCodec::<A, Q>::default())
        .apply_max_message_size_config(Some(grpc::MESSAGE), None)
        .unary(service, request)
        .await
}

/// At once, and whenever it becomes another; while nothing is known, nothing.
async fn stream_is_active(
    request: Request<Incoming>,
    shared: Arc<Shared>,
    tally: Arc<AdapterStats>,
) -> Response<Body> {
    let service = tower::service_fn(|request: tonic::Request<ScaledObjectRef>| {
        let (shared, tally) = (Arc::clone(&shared), Arc::clone(&tally));
        let answer = Wanted::of(request.get_ref()).map(|wanted| {
            let mut last = None;
            let changes = IntervalStream::new(clock(EVERY)).filter_map(move |_| {
                let now = wanted.is_active(&shared).ok()?;
                if last.replace(now.result) == Some(now.result) {
                    return None;
                }
                tally.said(&format!("active: {}", now.result));
                Some(Ok::<_, Status>(now))
            });
            tonic::Response::new(changes)
        });
        std::future::ready(answer)
    });
    Grpc::new(ProstCodec::<IsActiveResponse, ScaledObjectRef>::default())
        .apply_max_message_size_config(Some(grpc::MESSAGE), None)
        .server_streaming(service, request)
        .await
}

#[cfg(test)]
mod tests {
    use super::*;

    fn object(metadata: &[(&str, &str)]) -> ScaledObjectRef {
        let pairs = metadata
            .iter()
            .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()));
        ScaledObjectRef {
            scaler_metadata: pairs.collect(),
            ..ScaledObjectRef::default()
        }
    }

    #[test]
    fn what_a_scaled_object_asks_for_is_checked() {
        let wanted = Wanted::of(&object(&[("target", "shop"), ("targetLoad", "0.5")])).unwrap();
        assert_eq!(wanted.target_load, 0.5);
        assert_eq!(wanted.spec().metric_specs[0].target_size, 1, "an old KEDA");
        let wanted = Wanted::of(&object(&[("target", "shop")])).unwrap();
        assert_eq!((wanted.target_load, wanted.activation_load), (0.8, None));
        for (metadata, words) in [
            (object(&[]), "no target"),
            (object(&[("target", "")]), "no target"),
            (
                object(&[("target", "a"), ("targetLoad", "much")]),
                "\"much\"",
            ),
            (
                object(&[("target", "a"), ("metric", "max")]),
                "neither \"sum\"",
            ),
            (
                object(&[("target", "a"), ("activationLoad", "-1")]),
                "\"-1\"",
            ),
        ] {
            let status = Wanted::of(&metadata).unwrap_err();
            assert_eq!(status.code(), tonic::Code::InvalidArgument);
            assert!(status.message().contains(words), "{status:?}");
        }
    }

    #[test]
    fn instances_are_those_of_the_name_alone() {
        assert!(is_instance("shop", "shop") && is_instance("shop@4711", "shop"));
        for other in ["shop-b", "shop@x", "shopper", "sho", "my-shop"] {
            assert!(!is_instance(other, "shop"), "{other}");
        }
    }
}
