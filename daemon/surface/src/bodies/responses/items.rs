//! What went into a stored response, item by item, and which item does a reference name?

use super::request::Fields;
use super::script::{Script, Tokens};
use super::stored::{self, ResponseId};
use crate::refusal::Refusal;
use serde::Deserialize;
use serde_json::{Value, json};
use sparsed_engine::api::Owner;
use sparsed_engine::{ChatMessage, Role, SaidTurn, Service, ToolCall};
use std::collections::HashMap;

/// Items of a page, when the client does not say, and most of them.
const PAGE: (usize, usize) = (20, 100);
/// Most responses whose items an input may refer to: each is read from its session.
const REFERRED_MAX: usize = 64;
/// What names of items begin with: messages, reasoning, calls, and results of calls.
const KINDS: [&str; 4] = ["msg_", "rs_", "fc_", "fco_"];

/// Which part of a list is wanted, as OpenAI's lists have it.
#[derive(Debug, Default, Deserialize)]
pub(crate) struct Page {
    limit: Option<usize>,
    order: Option<Order>,
    after: Option<String>,
}

#[derive(Clone, Copy, Debug, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Order {
    Asc,
    #[default]
    Desc,
}

/// All that the model was given for the response `id`: the conversation before it and its own input, without
/// instructions.
///
/// # Errors
/// There is none of that name; what is wrong with the page.
pub(crate) async fn list(service: &Service, owner: Owner, id: ResponseId, page: &Page) -> Result<Value, Refusal> {
    let (model, turns) = stored::turns(service, owner, id, "response_id").await?;
    let mut items = Vec::new();
    for (number, turn) in (0..=id.turn).zip(&turns) {
        let at = ResponseId { turn: number, ..id };
        items.extend(asked(at, turn));
        if number < id.turn {
            items.extend(answered(at, &model, turn));
        }
    }
    page.cut(items)
}

/// Puts what references name in their place.
///
/// # Errors
/// One names nothing that is kept; they name items of too many responses.
pub(super) async fn resolve(service: &Service, owner: Owner, fields: &mut Fields) -> Result<(), Refusal> {
    let mut known = HashMap::<ResponseId, Vec<Value>>::new();
    for (at, item) in fields.items_mut().iter_mut().enumerate() {
        if item.get("type").and_then(Value::as_str) != Some("item_reference") {
            continue;
        }
        let refused = |reason: String| Refusal::invalid(&format!("input[{at}].id"), reason);
        let name = item.get("id").and_then(Value::as_str).unwrap_or_default().to_owned();
        let unknown = || {
            refused(
                "names no item of a response that is stored: send the item itself, or ask with store true".to_owned(),
            )
        };
        let id = response_of(&name).ok_or_else(unknown)?;
        if !known.contains_key(&id) {
            if known.len() == REFERRED_MAX {
                return Err(refused(format!("is of a further response; {REFERRED_MAX} may be referred to")));
            }
            known.insert(id, items_at(service, owner, id).await?);
        }
        let found = known[&id].iter().find(|item| item["id"] == name).and_then(Value::as_object);
        *item = found.cloned().ok_or_else(unknown)?;
    }
    Ok(())
}

/// Of which response an item is, by its name.
fn response_of(name: &str) -> Option<ResponseId> {
    let rest = KINDS.iter().find_map(|kind| name.strip_prefix(kind))?;
    rest.rsplit_once('_')?.0.parse().ok()
}

/// What went into a response and what came of it; nothing where there is none of that name.
async fn items_at(service: &Service, owner: Owner, id: ResponseId) -> Result<Vec<Value>, Refusal> {
    let (model, turns) = match stored::turns(service, owner, id, "input").await {
        Ok(found) => found,
        Err(refusal) if refusal.name().status == 404 => return Ok(Vec::new()),
        Err(refusal) => return Err(refusal),
    };
    let turn = turns.get(id.turn as usize);
    Ok(turn.map_or_else(Vec::new, |turn| [asked(id, turn), answered(id, &model, turn)].concat()))
}

/// What was new in a turn.
fn asked(id: ResponseId, turn: &SaidTurn) -> Vec<Value> {
    let is_rules = |(at, message): &(usize, &ChatMessage)| id.turn == 0 && *at == 0 && message.role == Role::System;
    let messages = turn.messages.iter().enumerate().filter(|message| !is_rules(message));
    let items = messages.flat_map(|(_, message)| items_of(message));
    let named = items.enumerate().map(|(at, (kind, mut item))| {
        item["id"] = json!(format!("{kind}{id}_in{at}"));
        item["status"] = json!("completed");
        item
    });
    named.collect()
}

/// A message as items, and what their names begin with.
fn items_of(message: &ChatMessage) -> Vec<(&'static str, Value)> {
    let text = message.content.clone().unwrap_or_default();
    if message.role == Role::Tool {
        let output = json!({ "type": "function_call_output", "call_id": message.tool_call_id, "output": text });
        return vec![("fco_", output)];
    }
    let content = match message.role {
        Role::Assistant => json!({ "type": "output_text", "text": text, "annotations": [], "logprobs": [] }),
        _ => json!({ "type": "input_text", "text": text }),
    };
    let said = json!({ "type": "message", "role": message.role.as_str(), "content": [content] });
    let call = |call: &ToolCall| {
        let ToolCall { id, name, arguments } = call;
        json!({ "type": "function_call", "call_id": id, "name": name, "arguments": arguments })
    };
    let said = (!text.is_empty() || message.tool_calls.is_empty()).then_some(("msg_", said));
    said.into_iter().chain(message.tool_calls.iter().map(|one| ("fc_", call(one)))).collect()
}

/// What was answered in a turn, as its response's `output` has it.
fn answered(id: ResponseId, model: &str, turn: &SaidTurn) -> Vec<Value> {
    let Some(answer) = &turn.answer else { return Vec::new() };
    let mut script = Script::begin(stored::head(id, model, turn), None);
    stored::say(&mut script, answer);
    script.end(&stored::end(turn), Tokens::default());
    script.response("completed")["output"].as_array().cloned().unwrap_or_default()
}

impl Page {
    fn cut(&self, mut items: Vec<Value>) -> Result<Value, Refusal> {
        let limit = self.limit.unwrap_or(PAGE.0);
        if !(1..=PAGE.1).contains(&limit) {
            return Err(Refusal::invalid("limit", format!("is {limit}, must be 1 to {}", PAGE.1)));
        }
        if let Order::Desc = self.order.unwrap_or_default() {
            items.reverse();
        }
        if let Some(after) = &self.after {
            let at = items.iter().position(|item| item["id"] == *after);
            let at = at.ok_or_else(|| Refusal::invalid("after", "names no item of this response"))?;
            items.drain(..=at);
        }
        let has_more = items.len() > limit;
        items.truncate(limit);
        let name = |item: Option<&Value>| item.map(|item| item["id"].clone());
        let (first, last) = (name(items.first()), name(items.last()));
        Ok(json!({ "object": "list", "data": items, "first_id": first, "last_id": last, "has_more": has_more }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use sparsed_engine::{SessionId, TurnEnd};

    fn turn(messages: Vec<ChatMessage>) -> SaidTurn {
        let (answer, end) = (Some(ChatMessage::new(Role::Assistant, "Yes.")), TurnEnd::Complete);
        let (reason, max_tokens, in_background) = (None, None, false);
        SaidTurn { at: 0, messages, answer, end, reason, prompt_tokens: 1, answer_tokens: 1, max_tokens, in_background }
    }

    fn id(turn: u32) -> ResponseId {
        ResponseId { session: SessionId::from_bytes([7; 16]), turn }
    }

    #[test]
    fn a_turns_messages_are_items_with_names_and_instructions_are_none_of_them() {
        let call = ToolCall { id: "c".to_owned(), name: "f".to_owned(), arguments: "{}".to_owned() };
        let called = ChatMessage { content: None, tool_calls: vec![call], ..ChatMessage::new(Role::Assistant, "") };
        let result = ChatMessage { tool_call_id: Some("c".to_owned()), ..ChatMessage::new(Role::Tool, "1") };
        let rules = ChatMessage::new(Role::System, "Be brief.");
        let turn = turn(vec![rules, ChatMessage::new(Role::User, "Hello"), called, result]);
        let items = asked(id(0), &turn);
        let kinds: Vec<&str> = items.iter().map(|item| item["type"].as_str().unwrap()).collect();
        assert_eq!(kinds, ["message", "function_call", "function_call_output"]);
        assert_eq!((&items[0]["content"][0]["text"], &items[2]["call_id"]), (&json!("Hello"), &json!("c")));
        assert_eq!(asked(id(1), &turn).len(), 4, "later it is a message as any other");
        let names: std::collections::BTreeSet<&str> = items.iter().map(|item| item["id"].as_str().unwrap()).collect();
        assert_eq!(names.len(), 3);
        for name in names {
            assert_eq!(response_of(name), Some(id(0)), "{name}");
        }
    }

    #[test]
    fn an_answer_has_the_items_of_its_response() {
        let items = answered(id(3), "m", &turn(Vec::new()));
        assert_eq!(items[0]["content"][0]["text"], "Yes.");
        assert_eq!(items[0]["id"], format!("msg_{}_0", id(3)));
    }

    #[test]
    fn a_list_comes_in_pages_from_either_end() {
        let items: Vec<Value> = (0..5).map(|at| json!({ "id": format!("i{at}") })).collect();
        let page = |query: Value| {
            let page: Page = serde_json::from_value(query).unwrap();
            let cut = page.cut(items.clone()).map_err(|refusal| refusal.body()["error"]["param"].clone())?;
            let names = cut["data"].as_array().unwrap().iter().map(|item| item["id"].as_str().unwrap().to_owned());
            Ok::<_, Value>((names.collect::<Vec<_>>().join(" "), cut["has_more"].as_bool().unwrap()))
        };
        assert_eq!(page(json!({})), Ok(("i4 i3 i2 i1 i0".to_owned(), false)));
        assert_eq!(page(json!({ "limit": 2, "order": "asc" })), Ok(("i0 i1".to_owned(), true)));
        assert_eq!(page(json!({ "limit": 2, "after": "i2" })), Ok(("i1 i0".to_owned(), false)));
        assert_eq!(page(json!({ "after": "i9" })), Err("after".into()));
        assert_eq!(
            (page(json!({ "limit": 0 })), page(json!({ "limit": 101 }))),
            (Err("limit".into()), Err("limit".into()))
        );
    }
}
