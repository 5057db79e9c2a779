//! How many requests has a client under way? Those with a body count, from their head to the end of the answer.
//!
//! Looks at what is there, and at how things are, are for anybody at any time: a client that is told to wait may ask
//! why. So is what ends one.

use crate::refusal::Refusal;
use axum::body::{Body, HttpBody};
use axum::extract::{Request, State};
use axum::http::Method;
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use futures_util::StreamExt;
use sparsed_engine::api::Owner;
use sparsed_engine::{Admission, Service};
use std::sync::Arc;

/// The request as it is counted, for what goes on behind its answer: it counts as long as somebody has this.
#[derive(Clone, Debug)]
pub(crate) struct Counted(pub(crate) Arc<Admission>);

pub(crate) async fn count(State(service): State<Service>, mut request: Request, next: Next) -> Response {
    let owner = request.extensions().get::<Owner>().copied();
    let is_counted = request.method() == Method::POST && !request.uri().path().ends_with("/cancel");
    let Some(owner) = owner.filter(|_| is_counted) else {
        return next.run(request).await;
    };
    let admission = match service.admit(owner) {
        Ok(admission) => Arc::new(admission),
        Err(failure) => return Refusal::from(failure).into_response(),
    };
    request.extensions_mut().insert(Counted(Arc::clone(&admission)));
    let response = next.run(request).await;
    if response.body().size_hint().exact().is_some() {
        return response;
    }
    // An answer that comes in pieces is under way until its last one, or until its client is gone.
    response.map(|body| {
        let pieces = body.into_data_stream();
        Body::from_stream(pieces.inspect(move |_| {
            let _counts_as_long_as_the_stream_lives = &admission;
        }))
    })
}
