//! Tokens and logprobs on their way from a worker, and its load: columns written and read with care.

use petek_core::ids::TokenId;
use petek_core::limits::request::LOGPROBS_MAX;
use petek_core::refusal::Refusal;

use crate::hello::protocol;
use crate::worker::v1::{LoadReport, Logprobs, StepEntry};

/// The logprobs of one token.
#[derive(Clone, Debug, PartialEq)]
pub struct LogprobRow<'a> {
    /// The token's own.
    pub logprob: f32,
    /// 1 + larger logits + equal ones of a lower id.
    pub rank: u32,
    /// The most likely tokens' ids, most likely first.
    pub top_ids: &'a [TokenId],
    /// Their logprobs.
    pub top_logprobs: &'a [f32],
}

impl Logprobs {
    /// Appends a token's row. All rows have as many top tokens as the first.
    pub fn push(&mut self, logprob: f32, rank: u32, top: &[(TokenId, f32)]) {
        if self.chosen.is_empty() {
            self.top_count = top.len() as u32;
        }
        debug_assert_eq!(self.top_count as usize, top.len(), "a request's rows are equally wide");
        self.chosen.push(logprob);
        self.ranks.push(rank);
        self.top_ids.extend(top.iter().map(|(id, _)| id));
        self.top_logprobs.extend(top.iter().map(|(_, logprob)| logprob));
    }

    /// The rows, in order.
    ///
    /// # Errors
    /// `Protocol` where the columns do not fit together.
    pub fn rows(&self) -> Result<impl ExactSizeIterator<Item = LogprobRow<'_>>, Refusal> {
        let rows = self.chosen.len();
        let width = self.top_count as usize;
        let fits = self.ranks.len() == rows
            && width <= LOGPROBS_MAX.into()
            && self.top_ids.len() == rows * width
            && self.top_logprobs.len() == rows * width;
        if !fits {
            return Err(protocol(format!(
                "logprobs has {rows} rows of {width}, but {} ranks, {} top_ids and {} top_logprobs",
                self.ranks.len(),
                self.top_ids.len(),
                self.top_logprobs.len()
            )));
        }
        Ok((0..rows).map(move |row| LogprobRow {
            logprob: self.chosen[row],
            rank: self.ranks[row],
            top_ids: &self.top_ids[row * width..][..width],
            top_logprobs: &self.top_logprobs[row * width..][..width],
        }))
    }
}

impl StepEntry {
    /// Checks that there are tokens, and a row of logprobs for each or none at all.
    ///
    /// # Errors
    /// `Protocol` that names the dispatch.
    pub fn check(&self) -> Result<(), Refusal> {
        let rows = match &self.logprobs {
            None => self.ids.len(),
            Some(logprobs) => logprobs.rows()?.len(),
        };
        if self.ids.is_empty() || rows != self.ids.len() {
            return Err(protocol(format!(
                "dispatch {} got {} tokens and {rows} rows of logprobs",
                self.dispatch,
                self.ids.len()
            )));
        }
        Ok(())
    }
}

impl LoadReport {
    /// Checks that its times and rates can stand in a cost.
    ///
    /// # Errors
    /// `Protocol` that names what is not a finite number from 0 up.
    pub fn check(&self) -> Result<(), Refusal> {
        let numbers = [
            ("step_s", self.step_s),
            ("step_one_more_s", self.step_one_more_s),
            ("prefill_tokens_per_s", self.prefill_tokens_per_s),
        ];
        match numbers.into_iter().find(|(_, value)| !(value.is_finite() && *value >= 0.0)) {
            None => Ok(()),
            Some((name, value)) => {
                Err(protocol(format!("load.{name} must be finite and at least 0, not {value}")))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn two_rows() -> Logprobs {
        let mut logprobs = Logprobs::default();
        logprobs.push(-0.5, 1, &[(7, -0.5), (3, -2.0)]);
        logprobs.push(-9.0, 40, &[(1, -0.1), (2, -3.0)]);
        logprobs
    }

    #[test]
    fn rows_come_back_as_they_went() {
        let logprobs = two_rows();
        let rows: Vec<_> = logprobs.rows().unwrap().collect();
        let second = LogprobRow { logprob: -9.0, rank: 40, top_ids: &[1, 2], top_logprobs: &[-0.1, -3.0] };
        assert_eq!((rows.len(), &rows[1]), (2, &second));
        let mut narrow = Logprobs::default();
        narrow.push(-1.0, 2, &[]);
        assert_eq!(narrow.rows().unwrap().next().unwrap().top_ids, &[] as &[u32]);
        assert_eq!(Logprobs::default().rows().unwrap().len(), 0);
    }

    #[test]
    fn columns_that_do_not_fit_are_refused() {
        let breaks: [fn(&mut Logprobs); 6] = [
            |l| l.ranks.truncate(1),
            |l| l.top_ids.truncate(3),
            |l| l.top_logprobs.clear(),
            |l| l.chosen.push(0.0),
            |l| l.top_count = 1,
            |l| l.top_count = u32::MAX,
        ];
        for change in breaks {
            let mut logprobs = two_rows();
            change(&mut logprobs);
            assert!(logprobs.rows().is_err(), "{logprobs:?}");
        }
        let mut wide = Logprobs { top_count: 21, ..Logprobs::default() };
        wide.push(-1.0, 1, &[(1, -1.0); 21]);
        assert!(wide.rows().is_err());
    }

    #[test]
    fn an_entry_has_a_row_for_each_token_or_none() {
        let entry = |ids: &[u32], logprobs| StepEntry { ids: ids.into(), logprobs, ..StepEntry::default() };
        assert!(entry(&[1], None).check().is_ok());
        assert!(entry(&[1, 2], Some(two_rows())).check().is_ok());
        assert!(entry(&[], None).check().is_err());
        assert!(entry(&[1], Some(two_rows())).check().is_err());
        assert!(entry(&[1, 2], Some(Logprobs { top_count: 5, ..two_rows() })).check().is_err());
    }

    #[test]
    fn a_load_that_would_poison_a_cost_is_refused() {
        let good = LoadReport { prefill_tokens_per_s: 900.0, step_s: 0.01, ..LoadReport::default() };
        assert!(good.check().is_ok());
        for bad in [f64::NAN, f64::INFINITY, -1.0] {
            assert!(LoadReport { step_s: bad, ..good.clone() }.check().is_err());
            assert!(LoadReport { step_one_more_s: bad, ..good.clone() }.check().is_err());
            let refusal = LoadReport { prefill_tokens_per_s: bad, ..good.clone() }.check().unwrap_err();
            assert!(refusal.to_string().contains("load.prefill_tokens_per_s"), "{refusal}");
        }
    }
}
