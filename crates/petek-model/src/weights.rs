//! The weights of a model folder: a table of names, checked against the config, over mapped safetensors files.

use std::collections::BTreeMap;
use std::ops::Range;

use petek_device::file::MappedFile;
use petek_device::ops::{Format, Tensor};

use crate::LoadError;
use crate::config::{AttentionBias, DecoderConfig, HeadWeights, Mlp};
use crate::safetensors_file::{Dtype, Entry, parse_header};

/// A tensor of one layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(missing_docs, reason = "the names are the weights' own")]
pub enum LayerTensor {
    InputNorm,
    Q,
    K,
    V,
    O,
    QBias,
    KBias,
    VBias,
    OBias,
    PostAttentionNorm,
    Gate,
    Up,
    Down,
    GateBias,
    UpBias,
    DownBias,
}

use LayerTensor::*;

/// Names below `model.layers.N.`.
const LAYER_NAMES: [(LayerTensor, &str); 16] = [
    (InputNorm, "input_layernorm.weight"),
    (Q, "self_attn.q_proj.weight"),
    (K, "self_attn.k_proj.weight"),
    (V, "self_attn.v_proj.weight"),
    (O, "self_attn.o_proj.weight"),
    (QBias, "self_attn.q_proj.bias"),
    (KBias, "self_attn.k_proj.bias"),
    (VBias, "self_attn.v_proj.bias"),
    (OBias, "self_attn.o_proj.bias"),
    (PostAttentionNorm, "post_attention_layernorm.weight"),
    (Gate, "mlp.gate_proj.weight"),
    (Up, "mlp.up_proj.weight"),
    (Down, "mlp.down_proj.weight"),
    (GateBias, "mlp.gate_proj.bias"),
    (UpBias, "mlp.up_proj.bias"),
    (DownBias, "mlp.down_proj.bias"),
];
const EMBEDDING: &str = "model.embed_tokens.weight";
const FINAL_NORM: &str = "model.norm.weight";
const HEAD: &str = "lm_head.weight";
/// Tables that old exports carry; petek makes its own.
const UNUSED_SUFFIX: &str = "rotary_emb.inv_freq";

/// The tensors of a folder, checked whole: names and shapes are what the config implies.
#[derive(Clone, Debug)]
pub struct Weights {
    files: Vec<MappedFile>,
    tensors: BTreeMap<String, Assigned>,
    head: Head,
}

/// A tensor and the file that it was assigned to.
#[derive(Clone, Debug)]
pub struct Assigned {
    file: usize,
    /// What the file's header says.
    pub entry: Entry,
}

/// What the files hold for the head.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Head {
    Embedding,
    Own,
}

/// Something in a folder that is served all the same, and that its owner should know.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Warning(pub String);

impl Weights {
    /// Takes `files` and the tensors assigned to each (`None`: all that the file holds; then there is one file).
    ///
    /// *Errors*: by name: a header that breaks a rule, a tensor that is missing, has another shape or format, or that the config
    /// does not use.
    pub fn new(
        files: Vec<MappedFile>,
        assigned: Option<&BTreeMap<String, usize>>,
        config: &DecoderConfig,
    ) -> Result<(Self, Vec<Warning>), LoadError> {
        let mut tensors = BTreeMap::new();
        for (index, file) in files.iter().enumerate() {
            let header = parse_header(file.bytes())
                .map_err(|rule| LoadError::Safetensors { file: file.path().display().to_string(), rule })?;
            for (name, entry) in header {
                if assigned.is_none_or(|assigned| assigned.get(&name) == Some(&index)) {
                    tensors.insert(name, Assigned { file: index, entry });
                }
            }
        }
        for (name, index) in assigned.into_iter().flatten() {
            if !tensors.contains_key(name) {
                let file = files[*index].path().display().to_string();
                return Err(LoadError::Tensor {
                    name: name.clone(),
                    problem: format!("the index places it in {file}, which lacks it"),
                });
            }
        }
        let mut weights = Self { files, tensors, head: Head::Own };
        weights.check(config)?;
        let warnings = weights.settle_head(config)?;
        Ok((weights, warnings))
    }

    /// All tensors, by name, for the revision: name, what its header says, its bytes.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Entry, &[u8])> {
        self.tensors.iter().map(|(name, assigned)| (name.as_str(), &assigned.entry, self.bytes(assigned)))
    }

    /// The format that most of the weights' bytes are in: what `--dtype` is when nothing says otherwise.
    pub fn format(&self) -> Format {
        self.tensors.get(EMBEDDING).map_or(Format::F32, |assigned| assigned.entry.dtype.format())
    }

    /// The embedding, `[vocabulary, hidden]`.
    pub fn embedding(&self) -> Result<Tensor<'_>, LoadError> {
        self.matrix(EMBEDDING)
    }

    /// The head where it has weights of its own.
    pub fn head(&self) -> Result<Option<Tensor<'_>>, LoadError> {
        match self.head {
            Head::Own => self.matrix(HEAD).map(Some),
            Head::Embedding => Ok(None),
        }
    }

    /// The final norm's weights.
    pub fn final_norm(&self) -> Result<Vec<f32>, LoadError> {
        self.values(FINAL_NORM)
    }

    /// Some outputs of a layer's matrix.
    pub fn outputs(
        &self,
        layer: usize,
        tensor: LayerTensor,
        rows: &Range<usize>,
    ) -> Result<Tensor<'_>, LoadError> {
        let whole = self.matrix(&layer_name(layer, tensor))?;
        Ok(Tensor { row0: rows.start, rows: rows.len(), ..whole })
    }

    /// Some inputs of a layer's matrix.
    pub fn inputs(
        &self,
        layer: usize,
        tensor: LayerTensor,
        cols: &Range<usize>,
    ) -> Result<Tensor<'_>, LoadError> {
        let whole = self.matrix(&layer_name(layer, tensor))?;
        Ok(Tensor { col0: cols.start, cols: cols.len(), ..whole })
    }

    /// A layer's vector, widened to f32.
    pub fn vector(&self, layer: usize, tensor: LayerTensor) -> Result<Vec<f32>, LoadError> {
        self.values(&layer_name(layer, tensor))
    }

    fn bytes(&self, assigned: &Assigned) -> &[u8] {
        &self.files[assigned.file].bytes()[assigned.entry.bytes.clone()]
    }

    fn assigned(&self, name: &str) -> Result<&Assigned, LoadError> {
        self.tensors.get(name).ok_or_else(|| missing(name))
    }

    fn matrix(&self, name: &str) -> Result<Tensor<'_>, LoadError> {
        let Some((stored, assigned)) = self.tensors.get_key_value(name) else { return Err(missing(name)) };
        let (rows, cols) = match assigned.entry.shape[..] {
            [rows, cols] => (rows, cols),
            [len] => (1, len),
            _ => (0, 0),
        };
        Ok(Tensor {
            name: stored,
            format: assigned.entry.dtype.format(),
            bytes: self.bytes(assigned),
            stride: cols,
            row0: 0,
            rows,
            col0: 0,
            cols,
        })
    }

    fn values(&self, name: &str) -> Result<Vec<f32>, LoadError> {
        let vector = self.matrix(name)?;
        Ok((0..vector.cols).map(|col| vector.at(0, col)).collect())
    }

    /// Every tensor that the config implies is there in its shape, and nothing else is.
    fn check(&mut self, config: &DecoderConfig) -> Result<(), LoadError> {
        let expected = expected_tensors(config);
        for (name, shape) in &expected {
            let entry = &self.assigned(name)?.entry;
            if entry.shape != *shape {
                let problem = format!("its shape is {:?}, the config implies {shape:?}", entry.shape);
                return Err(LoadError::Tensor { name: name.clone(), problem });
            }
        }
        self.tensors.retain(|name, _| !name.ends_with(UNUSED_SUFFIX));
        for (name, assigned) in &self.tensors {
            if name != HEAD && !expected.contains_key(name) {
                let problem =
                    "the config does not use it; a model that needs it would be computed wrongly".to_owned();
                return Err(LoadError::Tensor { name: name.clone(), problem });
            }
            if assigned.entry.dtype == Dtype::Other {
                let problem = "its dtype is none of F32, BF16, F16".to_owned();
                return Err(LoadError::Tensor { name: name.clone(), problem });
            }
        }
        Ok(())
    }

    /// A head in the files that differs from the embedding beats the tie flag; an untied model without one is refused.
    fn settle_head(&mut self, config: &DecoderConfig) -> Result<Vec<Warning>, LoadError> {
        let tied = config.head == HeadWeights::Tied;
        let Some(head) = self.tensors.get(HEAD) else {
            self.head = Head::Embedding;
            let problem = "tie_word_embeddings is false and no file holds it".to_owned();
            return if tied {
                Ok(Vec::new())
            } else {
                Err(LoadError::Tensor { name: HEAD.to_owned(), problem })
            };
        };
        let shape = vec![config.vocabulary, config.hidden];
        if head.entry.shape != shape {
            let problem = format!("its shape is {:?}, the config implies {shape:?}", head.entry.shape);
            return Err(LoadError::Tensor { name: HEAD.to_owned(), problem });
        }
        let embedding = self.assigned(EMBEDDING)?;
        let same = head.entry.dtype == embedding.entry.dtype && self.bytes(head) == self.bytes(embedding);
        self.head = if same { Head::Embedding } else { Head::Own };
        if tied && !same {
            let text = "tie_word_embeddings is true, but the files hold an lm_head.weight that differs from the embedding: \
                        the head in the files is used";
            return Ok(vec![Warning(text.to_owned())]);
        }
        Ok(Vec::new())
    }
}

fn missing(name: &str) -> LoadError {
    LoadError::Tensor {
        name: name.to_owned(),
        problem: "the config needs it and no file holds it".to_owned(),
    }
}

fn layer_name(layer: usize, tensor: LayerTensor) -> String {
    let suffix = LAYER_NAMES.iter().find(|(known, _)| *known == tensor).map_or("", |(_, name)| name);
    format!("model.layers.{layer}.{suffix}")
}

/// Names and shapes of everything but the head.
fn expected_tensors(config: &DecoderConfig) -> BTreeMap<String, Vec<usize>> {
    let Mlp::SwiGlu { width, bias } = config.mlp;
    let (hidden, heads) = (config.hidden, config.heads);
    let (query, kv) = (heads.query * heads.dim, heads.kv * heads.dim);
    let mut layer = vec![
        (InputNorm, vec![hidden]),
        (Q, vec![query, hidden]),
        (K, vec![kv, hidden]),
        (V, vec![kv, hidden]),
        (O, vec![hidden, query]),
        (PostAttentionNorm, vec![hidden]),
        (Gate, vec![width, hidden]),
        (Up, vec![width, hidden]),
        (Down, vec![hidden, width]),
    ];
    if config.attention_bias == AttentionBias::All {
        layer.extend([(QBias, vec![query]), (KBias, vec![kv]), (VBias, vec![kv]), (OBias, vec![hidden])]);
    }
    if bias {
        layer.extend([(GateBias, vec![width]), (UpBias, vec![width]), (DownBias, vec![hidden])]);
    }
    let outer =
        [(EMBEDDING.to_owned(), vec![config.vocabulary, hidden]), (FINAL_NORM.to_owned(), vec![hidden])];
    let layers = (0..config.layers).flat_map(|index| {
        layer.iter().map(move |(tensor, shape)| (layer_name(index, *tensor), shape.clone()))
    });
    layers.chain(outer).collect()
}
