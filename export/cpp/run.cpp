// Answer with an exported fedeq-edge model: needs onnxruntime's C++ API, nothing else.
//
//     run model.onnx samples.npy [--max-iter K] [--tol T] [--check logits.npy]
//
// samples.npy: one sample or a batch of them, float32. One line of JSON per sample on stdout. --check: stored logits
// of the same samples; exit 1 where ours differ by more than 1e-5 of the largest of them.

#include <onnxruntime_cxx_api.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iostream>
#include <iterator>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

constexpr float kAgreement = 1e-5f;

struct Options {
  std::string model, samples;
  std::optional<int64_t> max_iter;
  std::optional<float> tol;
  std::optional<std::string> check;
};

struct Array {
  std::vector<int64_t> shape;
  std::vector<float> values;
};

struct Answer {
  Array logits;
  std::vector<int64_t> iterations;
  std::vector<float> residual;
};

double number(const std::string& text) {
  char* end = nullptr;
  const double value = std::strtod(text.c_str(), &end);
  if (text.empty() || *end != '\0' || !(value >= 0.0)) throw std::runtime_error(text + " is no number of at least 0");
  return value;
}

Options parse(const std::vector<std::string>& words) {
  Options options;
  std::vector<std::string> files;
  for (size_t i = 0; i < words.size(); ++i) {
    if (words[i].rfind("--", 0) != 0) {
      files.push_back(words[i]);
      continue;
    }
    if (i + 1 == words.size()) throw std::runtime_error(words[i] + " needs a value");
    const std::string& value = words[i + 1];
    if (words[i] == "--max-iter") options.max_iter = static_cast<int64_t>(number(value));
    else if (words[i] == "--tol") options.tol = static_cast<float>(number(value));
    else if (words[i] == "--check") options.check = value;
    else throw std::runtime_error("unknown option " + words[i]);
    ++i;
  }
  if (files.size() != 2) {
    throw std::runtime_error("usage: run model.onnx samples.npy [--max-iter K] [--tol T] [--check logits.npy]");
  }
  options.model = files[0];
  options.samples = files[1];
  return options;
}

// The text between `before` and `after` in an .npy header, which is a Python dictionary in ASCII.
std::string between(const std::string& header, const std::string& before, char after) {
  const size_t at = header.find(before);
  if (at == std::string::npos) throw std::runtime_error("no " + before + " in the .npy header");
  const size_t start = at + before.size();
  return header.substr(start, header.find(after, start) - start);
}

std::vector<int64_t> sizes(const std::string& tuple) {
  std::vector<int64_t> shape;
  for (const char* at = tuple.c_str(); *at != '\0';) {
    char* end = nullptr;
    const long long size = std::strtoll(at, &end, 10);
    if (end == at) ++at;  // a comma or a blank
    else shape.push_back(size), at = end;
  }
  return shape;
}

size_t product(const std::vector<int64_t>& shape) {
  size_t count = 1;
  for (const int64_t size : shape) count *= static_cast<size_t>(size);
  return count;
}

// The float32 array in an .npy file. numpy writes little-endian on every machine that this runs on.
Array load(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  const std::string raw((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
  if (raw.size() < 12 || raw.compare(0, 6, "\x93NUMPY") != 0) throw std::runtime_error(path + ": not an .npy file");
  const auto byte = [&raw](size_t at) { return static_cast<size_t>(static_cast<unsigned char>(raw[at])); };
  const bool first = byte(6) == 1;
  const size_t start = first ? 10 : 12;
  const size_t data = start + byte(8) + (byte(9) << 8) + (first ? 0 : (byte(10) << 16) + (byte(11) << 24));
  if (data > raw.size()) throw std::runtime_error(path + ": cut off");
  const std::string header = raw.substr(start, data - start);
  if (between(header, "'descr': '", '\'') != "<f4" || between(header, "'fortran_order': ", ',') != "False") {
    throw std::runtime_error(path + ": save it as float32 in C order");
  }
  Array array{sizes(between(header, "'shape': (", ')')), {}};
  if (product(array.shape) != (raw.size() - data) / sizeof(float)) throw std::runtime_error(path + ": cut off");
  array.values.resize(product(array.shape));
  std::memcpy(array.values.data(), raw.data() + data, raw.size() - data);
  return array;
}

// What the file says of itself, under one of the names in README.md; `missing` where it says nothing.
std::string metadata(const Ort::Session& session, const char* key, const char* missing = nullptr) {
  Ort::AllocatorWithDefaultOptions allocator;
  const auto value = session.GetModelMetadata().LookupCustomMetadataMapAllocated(key, allocator);
  if (!value && !missing) throw std::runtime_error(std::string("not written by fedeq-edge (no ") + key + ")");
  return value ? value.get() : missing;
}

// version: of the metadata, major.minor; this program reads major version 1.
void refuse_newer(const std::string& version) {
  if (version.substr(0, version.find('.')) != "1") {
    throw std::runtime_error("the model has schema version " + version + ", this runner reads 1; take a newer one");
  }
}

// kind: of the file; a training graph is one of fedeq-edge, too.
void refuse_other(const std::string& kind) {
  if (kind != "inference") {
    throw std::runtime_error("a " + kind + " graph, which does not answer; take what fedeq model export writes");
  }
}

// The number after "name": in a flat JSON object.
double field(const std::string& json, const std::string& name) {
  const size_t at = json.find("\"" + name + "\":");
  if (at == std::string::npos) throw std::runtime_error("no " + name + " in fedeq.solver");
  return std::strtod(json.c_str() + at + name.size() + 3, nullptr);
}

// The elements of a JSON list of strings, quoted as they stand: they are printed as JSON again.
std::vector<std::string> strings(const std::string& json) {
  std::vector<std::string> found;
  for (size_t at = json.find('"'); at != std::string::npos; at = json.find('"', at)) {
    size_t end = at + 1;
    while (end < json.size() && json[end] != '"') end += json[end] == '\\' ? 2 : 1;
    found.push_back(json.substr(at, end + 1 - at));
    at = end + 1;
  }
  return found;
}

// x as a batch of what the model takes: one sample gets a first dimension of 1.
void as_batch(Array& x, const Ort::Session& session) {
  const auto expected = session.GetInputTypeInfo(0).GetTensorTypeAndShapeInfo().GetShape();
  if (x.shape.size() + 1 == expected.size()) x.shape.insert(x.shape.begin(), 1);
  if (x.shape.size() != expected.size() || !std::equal(x.shape.begin() + 1, x.shape.end(), expected.begin() + 1)) {
    throw std::runtime_error("samples have another shape than the model's input");
  }
}

template <typename T>
std::vector<T> copied(const Ort::Value& value) {
  const T* start = value.GetTensorData<T>();
  return std::vector<T>(start, start + value.GetTensorTypeAndShapeInfo().GetElementCount());
}

Answer infer(Ort::Session& session, Array& x, int64_t max_iter, float tol) {
  const auto memory = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
  std::vector<Ort::Value> feeds;
  feeds.push_back(Ort::Value::CreateTensor<float>(memory, x.values.data(), x.values.size(), x.shape.data(), x.shape.size()));
  feeds.push_back(Ort::Value::CreateTensor<float>(memory, &tol, 1, nullptr, 0));
  feeds.push_back(Ort::Value::CreateTensor<int64_t>(memory, &max_iter, 1, nullptr, 0));
  const std::array<const char*, 3> inputs{"x", "tol", "max_iter"}, outputs{"logits", "iterations", "residual"};
  const size_t count = std::min(inputs.size(), session.GetInputCount());  // an unrolled file takes x alone
  const auto found = session.Run(Ort::RunOptions{nullptr}, inputs.data(), feeds.data(), count, outputs.data(), 3);
  Array logits{found[0].GetTensorTypeAndShapeInfo().GetShape(), copied<float>(found[0])};
  return {std::move(logits), copied<int64_t>(found[1]), copied<float>(found[2])};
}

void print(const Answer& answer, const std::vector<std::string>& labels) {
  const size_t classes = labels.size();
  for (size_t i = 0; i < answer.iterations.size(); ++i) {
    const float* row = answer.logits.values.data() + i * classes;
    const bool known = std::all_of(row, row + classes, [](float value) { return std::isfinite(value); });
    std::cout << "{\"label\": " << (known ? labels[std::max_element(row, row + classes) - row] : "null")
              << ", \"iterations\": " << answer.iterations[i] << ", \"residual\": ";
    if (std::isfinite(answer.residual[i])) std::cout << answer.residual[i] << "}\n";
    else std::cout << "null}\n";  // JSON has no infinity
  }
}

// Whether our logits are the stored ones.
bool agrees(const Array& ours, const Array& stored) {
  if (ours.shape != stored.shape) throw std::runtime_error("the stored logits have another shape");
  float worst = 0.0f, largest = 0.0f;
  for (size_t i = 0; i < ours.values.size(); ++i) {
    const float difference = std::fabs(ours.values[i] - stored.values[i]);
    if (std::isnan(difference)) return false;
    worst = std::max(worst, difference);
    largest = std::max(largest, std::fabs(stored.values[i]));
  }
  std::cerr << "largest difference from the stored logits: " << worst << "\n";
  return worst <= kAgreement * largest;
}

int run(const Options& options) {
  Ort::Env environment(ORT_LOGGING_LEVEL_ERROR, "fedeq-edge");
  Ort::SessionOptions settings;
  settings.SetIntraOpNumThreads(1);  // models of this size gain nothing from a second
  Ort::Session session(environment, options.model.c_str(), settings);
  refuse_newer(metadata(session, "fedeq.schema_version"));
  refuse_other(metadata(session, "fedeq.kind", "inference"));  // early files do not say
  const std::string solver = metadata(session, "fedeq.solver");
  const auto labels = strings(metadata(session, "fedeq.labels"));
  Array x = load(options.samples);
  as_batch(x, session);
  const auto own_most = static_cast<int64_t>(field(solver, "max_iter"));
  const auto own_tol = static_cast<float>(field(solver, "tol"));
  const int64_t most = options.max_iter.value_or(own_most);
  const float tol = options.tol.value_or(own_tol);
  if (session.GetInputCount() == 1 && (most != own_most || tol != own_tol)) {
    throw std::runtime_error("unrolled for " + std::to_string(own_most) + " iterations; leave out --max-iter and --tol");
  }
  const Answer answer = infer(session, x, most, tol);
  print(answer, labels);
  return !options.check || agrees(answer.logits, load(*options.check)) ? 0 : 1;
}

}  // namespace

int main(int count, char** words) {
  setenv("ORT_DISABLE_TELEMETRY", "1", 1);  // read when the environment is made
  try {
    return run(parse(std::vector<std::string>(words + 1, words + count)));
  } catch (const std::exception& error) {
    std::cerr << "run: " << error.what() << "\n";
    return 1;
  }
}
