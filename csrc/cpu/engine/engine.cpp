#include "cpu/engine/engine.h"

#include <csignal>

#include <algorithm>
#include <stdexcept>
#include <string>

namespace gptfast::cpu::engine {
namespace {

std::string text(int64_t number) { return std::to_string(number); }

[[noreturn]] void refuse(const std::string& message) { throw std::invalid_argument(message); }

void check_range(const std::string& what, int64_t value, int64_t low, int64_t high) {
  if (value < low || value > high) refuse(what + " is " + text(value) + "; allowed: " + text(low) + " to " + text(high));
}

}  // namespace

Engine::Engine(Model model, int threads, int64_t pages)
    : model_(std::move(model)), cache_(model_, pages), team_(threads), rows_(model_, team_), forward_(model_, cache_, team_, rows_),
      head_(model_, team_, rows_) {}

// ------------------------------------------------------------------------------------------------------------------------- a step

void Engine::check(const Request& request, int64_t steps) const {
  int64_t row = 0;
  for (int64_t s = 0; s < request.sequences; ++s) {
    const std::string name = "sequence " + text(s) + ": ";
    const int64_t length = request.lengths[s], start = request.starts[s], end = start + length + steps - 1;
    check_range(name + "new tokens", length, s == 0 ? 1 : 0, model_.context);
    check_range(name + "tokens in the cache", start, 0, model_.context);
    check_range(name + "its length", end, 0, std::min(model_.context, request.width * kPage));
    if (length > 0) check_range(name + "draws", request.draws[s], 0, length);
    for (int64_t i = 0; i < length; ++i) check_range(name + "a token id", request.tokens[row + i], 0, model_.wte.outputs - 1);
    for (int64_t page = 0; page * kPage < end; ++page) {
      check_range(name + "a page", request.table[s * request.width + page], 0, cache_.pages - 1);
    }
    row += length;
  }
  if (row != request.total) refuse("there are " + text(request.total) + " tokens; lengths add up to " + text(row));
}

// Cuts the step into passes of at most kRows rows. Where a sequence is cut makes no difference to its bits.
void Engine::plan(const Request& request) {
  planned_.clear();
  int64_t row = 0;
  for (int64_t s = 0; s < request.sequences; ++s) {
    for (int64_t done = 0; done < request.lengths[s];) {
      if (planned_.empty() || planned_.back().pass.rows == kRows) planned_.emplace_back();
      Pass& pass = planned_.back().pass;
      const int64_t count = std::min(request.lengths[s] - done, kRows - pass.rows), start = request.starts[s] + done;
      pass.pieces.push_back({pass.rows, count, start, request.table + s * request.width});
      for (int64_t i = 0; i < count; ++i) {
        pass.tokens.push_back(request.tokens[row + done + i]);
        pass.positions.push_back(static_cast<int32_t>(start + i));
      }
      pass.rows += count;
      done += count;
    }
    row += request.lengths[s];
  }
  plan_draws(request);
}

void Engine::plan_draws(const Request& request) {
  int64_t end = 0, draw = 0, next = 0;
  const auto add = [&](int64_t row) {
    Planned& planned = planned_[row / kRows];
    if (planned.hidden.empty()) planned.first_draw = draw;
    planned.hidden.push_back(forward_.hidden(row % kRows));
    ++draw;
  };
  for (int64_t s = 0; s < request.sequences; ++s) {
    end += request.lengths[s];
    next = request.lengths[s] == 0 ? end : end - request.draws[s];
    for (int64_t i = 0; i < request.draws[s]; ++i) add(request.lengths[s] == 0 ? end - 1 : next + i);
  }
}

bool Engine::run_passes(int thread, const Draws& draws, const std::atomic<bool>* stop) {
  for (const Planned& planned : planned_) {
    if (!forward_.run(thread, planned.pass, stop)) return false;
    head_.run(thread, planned.hidden.data(), draws, planned.first_draw, static_cast<int64_t>(planned.hidden.size()));
  }
  return true;
}

bool Engine::step(const Request& request, const Draws& draws) {
  check(request, 1);
  plan(request);
  head_.prepare(draws);
  interrupted_.store(false, std::memory_order_relaxed);
  const bool single = std::all_of(request.lengths, request.lengths + request.sequences, [](int32_t length) { return length <= 1; });
  bool done = true;
  team_.run([&](int thread) {
    const bool whole = run_passes(thread, draws, single ? nullptr : &interrupted_);
    if (thread == 0) done = whole;
  });
  return done;
}

// ------------------------------------------------------------------------------------------------------------------- many tokens

// What was drawn becomes the next step's tokens; whether there is a next step
bool Engine::advance(const Draws& draws, const std::vector<std::vector<int64_t>>& stops) {
  bool more = !interrupted_.load(std::memory_order_relaxed);
  size_t s = 0;
  for (Planned& planned : planned_) {
    for (int64_t row = 0; row < planned.pass.rows; ++row, ++s) {
      ++planned.pass.positions[row];
      ++planned.pass.pieces[row].start;
      if (!draws.sampling) continue;
      const int64_t token = draws.sample.token[s];
      more &= draws.sample.status[s] == 0 && !std::binary_search(stops[s].begin(), stops[s].end(), token);
      planned.pass.tokens[row] = static_cast<int32_t>(token);
      ++positions_[s];
    }
  }
  return more;
}

namespace {

// Where the results of the next step go
void next_results(Sample& sample, int64_t count) {
  sample.token += count;
  sample.status += count;
  sample.logprob += count;
  sample.top_ids += count * sample.top_n;
  sample.top_logprobs += count * sample.top_n;
}

}  // namespace

int64_t Engine::decode(const Request& request, Draws draws, int64_t steps, const std::vector<std::vector<int64_t>>& stops) {
  check_range("steps", steps, 1, model_.context);
  for (int64_t s = 0; s < request.sequences; ++s) {
    if (request.lengths[s] != 1 || request.draws[s] != 1) refuse("sequence " + text(s) + " has not one new token and one draw");
  }
  check(request, steps);
  plan(request);
  head_.prepare(draws);
  if (draws.sampling) {
    positions_.assign(draws.sample.position, draws.sample.position + request.sequences);
    draws.sample.position = positions_.data();
  }
  interrupted_.store(false, std::memory_order_relaxed);
  int64_t done = 0;
  bool more = true;
  team_.run([&](int thread) {
    while (more) {
      run_passes(thread, draws, nullptr);  // ends with a barrier
      if (thread == 0) {
        const bool wanted = advance(draws, stops);
        more = ++done < steps && wanted;
        if (draws.sampling) next_results(draws.sample, request.sequences);
      }
      team_.barrier();
    }
  });
  return done;
}

void Engine::copy_page(int64_t from, int64_t to) {
  check_range("a page", from, 0, cache_.pages - 1);
  check_range("a page", to, 0, cache_.pages - 1);
  if (from != to) std::copy_n(cache_.page(from), cache_.page_bytes(), cache_.page(to));
}

void Engine::embed(int64_t token, int64_t position, float* y) const {
  check_range("a token id", token, 0, model_.wte.outputs - 1);
  check_range("a position", position, 0, model_.context - 1);
  GPTFAST_CALL(embed_token, model_.wte, token, model_.wpe + position * model_.width, y);
}

// ---------------------------------------------------------------------------------------------------------------------- Ctrl-C

namespace {

std::atomic<Engine*> running{nullptr};
struct sigaction handler_before;

void interrupt_running(int signal) {
  Engine* engine = running.load();
  if (engine != nullptr) engine->interrupt();
  handler_before.sa_handler(signal);
}

}  // namespace

Interruptible::Interruptible(Engine& engine) {
  struct sigaction before {};
  if (sigaction(SIGINT, nullptr, &before) != 0 || (before.sa_flags & SA_SIGINFO) || before.sa_handler == SIG_DFL ||
      before.sa_handler == SIG_IGN) {
    return;
  }
  Engine* none = nullptr;
  if (!running.compare_exchange_strong(none, &engine)) return;
  handler_before = before;
  struct sigaction ours = before;
  ours.sa_handler = interrupt_running;
  sigaction(SIGINT, &ours, nullptr);
  active_ = true;
}

Interruptible::~Interruptible() {
  if (!active_) return;
  sigaction(SIGINT, &handler_before, nullptr);
  running.store(nullptr);
}

}  // namespace gptfast::cpu::engine
