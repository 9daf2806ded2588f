//! What chat templates expect of Python: `json.dumps`, `str` methods that minijinja-contrib lacks, `strftime`.

use std::fmt::Write;

use chrono::DateTime;
use chrono::format::{Item, StrftimeItems};
use minijinja::value::{Kwargs, Value, ValueKind};
use minijinja::{Error, ErrorKind, Output, State, escape_formatter};

use crate::guard::is_noncharacter;

/// transformers' `tojson`: `json.dumps` with `ensure_ascii` off. Only the noncharacters that guard control tokens
/// are never escaped, so that they can be dropped afterwards.
pub(crate) fn tojson(
    value: &Value,
    ensure_ascii: Option<Value>,
    indent: Option<Value>,
    separators: Option<Value>,
    kwargs: Kwargs,
) -> Result<Value, Error> {
    let argument = |positional: Option<Value>, name: &str| -> Result<Option<Value>, Error> {
        let named: Option<Value> = kwargs.get(name)?;
        Ok(positional.or(named).filter(|value| !value.is_none() && !value.is_undefined()))
    };
    let ensure_ascii = argument(ensure_ascii, "ensure_ascii")?.is_some_and(|on| on.is_true());
    let indent = argument(indent, "indent")?;
    let separators = argument(separators, "separators")?;
    let sort_keys = argument(None, "sort_keys")?.is_some_and(|on| on.is_true());
    kwargs.assert_all_used()?;

    let indent = match &indent {
        None => None,
        Some(text) if text.as_str().is_some() => text.as_str().map(str::to_owned),
        Some(width) => Some(
            " ".repeat(width.as_i64().unwrap_or(usize::from(width.is_true()) as i64).clamp(0, 64) as usize),
        ),
    };
    let (item_separator, key_separator) = match &separators {
        Some(pair) => {
            let pair: Vec<Value> = pair.try_iter()?.take(3).collect();
            let [item, key] = &pair[..] else { return Err(invalid("separators must be two strings")) };
            let text = |value: &Value| value.as_str().map(str::to_owned);
            text(item).zip(text(key)).ok_or_else(|| invalid("separators must be two strings"))?
        }
        None if indent.is_some() => (",".to_owned(), ": ".to_owned()),
        None => (", ".to_owned(), ": ".to_owned()),
    };
    let mut dumps =
        Dumps { ensure_ascii, indent, item_separator, key_separator, sort_keys, out: String::new() };
    dumps.value(value, 0)?;
    Ok(Value::from(dumps.out))
}

struct Dumps {
    ensure_ascii: bool,
    indent: Option<String>,
    item_separator: String,
    key_separator: String,
    sort_keys: bool,
    out: String,
}

impl Dumps {
    fn value(&mut self, value: &Value, depth: usize) -> Result<(), Error> {
        match value.kind() {
            ValueKind::None => self.out.push_str("null"),
            ValueKind::Bool => self.out.push_str(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number => self.out.push_str(&number(value)?),
            ValueKind::String => self.string(value.as_str().unwrap_or_default()),
            ValueKind::Seq => {
                let items: Vec<Value> = value.try_iter()?.collect();
                self.list(('[', ']'), items.len(), depth, |dumps, i| dumps.value(&items[i], depth + 1))?;
            }
            ValueKind::Map => {
                let mut pairs = Vec::new();
                for key in value.try_iter()? {
                    let item = value.get_item(&key)?;
                    pairs.push((key_text(&key)?, item));
                }
                if self.sort_keys {
                    pairs.sort_by(|a, b| a.0.cmp(&b.0));
                }
                self.list(('{', '}'), pairs.len(), depth, |dumps, i| {
                    dumps.string(&pairs[i].0);
                    let separator = dumps.key_separator.clone();
                    dumps.out.push_str(&separator);
                    dumps.value(&pairs[i].1, depth + 1)
                })?;
            }
            kind => return Err(invalid(format!("a value of type {kind} is not JSON serializable"))),
        }
        Ok(())
    }

    fn list(
        &mut self,
        brackets: (char, char),
        count: usize,
        depth: usize,
        item: impl Fn(&mut Self, usize) -> Result<(), Error>,
    ) -> Result<(), Error> {
        self.out.push(brackets.0);
        for i in 0..count {
            if i > 0 {
                let separator = self.item_separator.clone();
                self.out.push_str(&separator);
            }
            self.line(depth + 1);
            item(self, i)?;
        }
        if count > 0 {
            self.line(depth);
        }
        self.out.push(brackets.1);
        Ok(())
    }

    fn line(&mut self, depth: usize) {
        if let Some(indent) = &self.indent {
            self.out.push('\n');
            self.out.push_str(&indent.repeat(depth));
        }
    }

    fn string(&mut self, text: &str) {
        self.out.push('"');
        for c in text.chars() {
            match c {
                '"' => self.out.push_str("\\\""),
                '\\' => self.out.push_str("\\\\"),
                '\n' => self.out.push_str("\\n"),
                '\r' => self.out.push_str("\\r"),
                '\t' => self.out.push_str("\\t"),
                '\u{8}' => self.out.push_str("\\b"),
                '\u{C}' => self.out.push_str("\\f"),
                c if c < ' ' || (self.ensure_ascii && c > '~' && !is_noncharacter(c)) => {
                    for unit in c.encode_utf16(&mut [0; 2]) {
                        let _ = write!(self.out, "\\u{unit:04x}");
                    }
                }
                c => self.out.push(c),
            }
        }
        self.out.push('"');
    }
}

fn key_text(key: &Value) -> Result<String, Error> {
    match key.kind() {
        ValueKind::String => Ok(key.as_str().unwrap_or_default().to_owned()),
        ValueKind::None => Ok("null".to_owned()),
        ValueKind::Bool => Ok(if key.is_true() { "true" } else { "false" }.to_owned()),
        ValueKind::Number => number(key),
        kind => Err(invalid(format!("a key of type {kind} is not JSON serializable"))),
    }
}

fn number(value: &Value) -> Result<String, Error> {
    if value.is_integer() { Ok(value.to_string()) } else { Ok(float(f64::try_from(value.clone())?)) }
}

/// Python's `repr` of a float: the shortest digits that read back, with an exponent below 1e-4 and from 1e16.
fn float(value: f64) -> String {
    if value.is_nan() {
        return "NaN".to_owned();
    }
    if value.is_infinite() {
        return if value > 0.0 { "Infinity" } else { "-Infinity" }.to_owned();
    }
    let scientific = format!("{value:e}");
    let (digits, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    match exponent.parse::<i32>() {
        Ok(exponent) if (-4..16).contains(&exponent) => format!("{value:?}"),
        Ok(exponent) => format!("{digits}e{}{:02}", if exponent < 0 { '-' } else { '+' }, exponent.abs()),
        Err(_) => scientific,
    }
}

/// `datetime.strftime` of a time in UTC.
pub(crate) fn strftime(unix_s: i64, format: &str) -> Result<String, Error> {
    let time =
        DateTime::from_timestamp(unix_s, 0).ok_or_else(|| invalid("the time is out of range"))?.naive_utc();
    let items: Vec<Item> = StrftimeItems::new(format).collect();
    let mut text = String::new();
    if items.contains(&Item::Error) || write!(text, "{}", time.format_with_items(items.iter())).is_err() {
        return Err(invalid(format!("strftime_now does not know a directive of {format:?}")));
    }
    Ok(text)
}

/// Methods of Python's `str` that templates use and `minijinja_contrib::pycompat` lacks; the rest is its.
pub(crate) fn method(state: &mut State, value: &Value, name: &str, args: &[Value]) -> Result<Value, Error> {
    let texts: Option<Vec<&str>> = args.iter().map(Value::as_str).collect();
    let (Some(text), Some([given])) = (value.as_str(), texts.as_deref()) else {
        return minijinja_contrib::pycompat::unknown_method_callback(state, value, name, args);
    };
    match name {
        "removeprefix" => Ok(Value::from(text.strip_prefix(given).unwrap_or(text))),
        "removesuffix" => Ok(Value::from(text.strip_suffix(given).unwrap_or(text))),
        "partition" | "rpartition" if given.is_empty() => Err(invalid("empty separator")),
        "partition" => Ok(text.split_once(given).map_or((text, "", ""), |(a, b)| (a, given, b)).into()),
        "rpartition" => Ok(text.rsplit_once(given).map_or(("", "", text), |(a, b)| (a, given, b)).into()),
        _ => minijinja_contrib::pycompat::unknown_method_callback(state, value, name, args),
    }
}

/// Writes a value as Python's `str` does. minijinja's own differs in floats that need an exponent alone.
pub(crate) fn write(out: &mut Output, state: &mut State, value: &Value) -> Result<(), Error> {
    match f64::try_from(value.clone()) {
        Ok(number) if value.is_number() && !value.is_integer() && number.is_finite() => {
            out.write_str(&float(number)).map_err(Error::from)
        }
        _ => escape_formatter(out, state, value),
    }
}

pub(crate) fn invalid(why: impl Into<std::borrow::Cow<'static, str>>) -> Error {
    Error::new(ErrorKind::InvalidOperation, why)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn floats_are_written_as_python_writes_them() {
        for (value, text) in [
            (0.0, "0.0"),
            (-0.0, "-0.0"),
            (1.0, "1.0"),
            (0.1, "0.1"),
            (1e15, "1000000000000000.0"),
            (1e16, "1e+16"),
            (1.5e300, "1.5e+300"),
            (0.0001, "0.0001"),
            (0.00001, "1e-05"),
            (1.25e-7, "1.25e-07"),
            (123456789.125, "123456789.125"),
            (f64::NEG_INFINITY, "-Infinity"),
        ] {
            assert_eq!(float(value), text);
        }
    }

    #[test]
    fn times_are_written_in_utc() {
        let time = 1_785_587_405; // 2026-08-01 12:30:05
        assert_eq!(strftime(time, "%d %b %Y").unwrap(), "01 Aug 2026");
        assert_eq!(
            strftime(time, "%A, %B %-d, %H:%M:%S %p %j %%").unwrap(),
            "Saturday, August 1, 12:30:05 PM 213 %"
        );
        assert!(strftime(time, "%Y %!").is_err());
        assert!(strftime(time, "%Y %z").is_err());
        assert!(strftime(i64::MAX, "%Y").is_err());
    }
}
