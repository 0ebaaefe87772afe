// StepMemory: a best-fit arena behind PyTorch's CPU allocator.
#include "cpu/memory.h"

#include <c10/core/Allocator.h>
#include <c10/util/Exception.h>
#include <sys/mman.h>
#include <unistd.h>

#include <map>
#include <mutex>
#include <set>
#include <unordered_map>
#include <utility>

namespace gptfast::cpu {

// A region of address space as large as the machine's memory, backed by pages as they are touched. Free pieces are joined with their
// neighbours, and the smallest that fits is taken: what a step's activations leave, its gradients use.
class Arena {
 public:
  Arena() : size_(static_cast<size_t>(sysconf(_SC_PHYS_PAGES)) * sysconf(_SC_PAGE_SIZE)) {
    void* region = mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (region == MAP_FAILED) {  // a limit on address space: then all memory is PyTorch's
      size_ = 0;
      return;
    }
    madvise(region, size_, MADV_HUGEPAGE);  // a wish: without huge pages it is only slower
    base_ = top_ = static_cast<char*>(region);
  }
  ~Arena() {
    if (size_ > 0) munmap(base_, size_);
  }
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;

  // nullptr where the region is used up
  void* take(size_t size) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto fit = by_size_.lower_bound({size, nullptr});
    char* piece = top_;
    if (fit != by_size_.end()) {
      const auto [found, address] = *fit;
      piece = address;
      erase(address, found);
      if (found > size) insert(piece + size, found - size);
    } else if (static_cast<size_t>(base_ + size_ - top_) >= size) {
      top_ += size;
    } else {
      return nullptr;
    }
    return piece;
  }

  void give_back(void* pointer, size_t size) {
    const std::lock_guard<std::mutex> lock(mutex_);
    char* piece = static_cast<char*>(pointer);
    auto after = by_address_.lower_bound(piece);
    if (after != by_address_.end() && after->first == piece + size) {
      const auto [address, length] = *after;
      size += length;
      erase(address, length);
    }
    auto before = by_address_.lower_bound(piece);
    if (before != by_address_.begin() && (--before)->first + before->second == piece) {
      const auto [address, length] = *before;
      piece = address;
      size += length;
      erase(address, length);
    }
    insert(piece, size);
  }

  size_t reached() const {
    const std::lock_guard<std::mutex> lock(mutex_);
    return top_ - base_;
  }

 private:
  void insert(char* address, size_t length) {
    by_address_.emplace(address, length);
    by_size_.emplace(length, address);
  }
  void erase(char* address, size_t length) {
    by_address_.erase(address);
    by_size_.erase({length, address});
  }

  mutable std::mutex mutex_;
  size_t size_;
  char *base_ = nullptr, *top_ = nullptr;  // nothing at or above top_ was ever handed out
  std::map<char*, size_t> by_address_;
  std::set<std::pair<size_t, char*>> by_size_;
};

namespace {

constexpr size_t kSmallest = size_t{256} << 10;
constexpr size_t kPage = 4096;

thread_local std::shared_ptr<Arena> entered;

// Stands before PyTorch's allocator: large tensors of a thread that entered a StepMemory come from its arena, all others from PyTorch's.
class Front final : public c10::Allocator {
 public:
  explicit Front(c10::Allocator* behind) : behind_(behind) {}

  c10::DataPtr allocate(size_t n) override {
    if (entered == nullptr || n < kSmallest) return behind_->allocate(n);
    const size_t size = (n + kPage - 1) / kPage * kPage;
    void* pointer = entered->take(size);
    if (pointer == nullptr) return behind_->allocate(n);
    const std::lock_guard<std::mutex> lock(mutex());
    pieces().emplace(pointer, Piece{size, entered});
    return {pointer, pointer, &release, c10::Device(c10::DeviceType::CPU)};
  }

  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t count) const override { behind_->copy_data(to, from, count); }

  static Front& installed() {
    static Front* front = [] {
      auto* made = new Front(c10::GetAllocator(c10::DeviceType::CPU));
      c10::SetAllocator(c10::DeviceType::CPU, made);
      return made;
    }();
    return *front;
  }

 private:
  struct Piece {
    size_t size;
    std::shared_ptr<Arena> arena;  // outlives every tensor in it
  };

  static void release(void* pointer) {
    Piece piece{};
    {
      const std::lock_guard<std::mutex> lock(mutex());
      const auto found = pieces().find(pointer);
      if (found != pieces().end()) {
        piece = std::move(found->second);
        pieces().erase(found);
      }
    }
    if (piece.arena) {
      piece.arena->give_back(pointer, piece.size);
    } else {
      installed().behind_->raw_deleter()(pointer);
    }
  }

  // never destroyed: tensors may be freed after this library's static objects
  static std::mutex& mutex() {
    static auto* value = new std::mutex;
    return *value;
  }
  static std::unordered_map<void*, Piece>& pieces() {
    static auto* value = new std::unordered_map<void*, Piece>;
    return *value;
  }

  c10::Allocator* behind_;
};

}  // namespace

StepMemory::StepMemory() : arena_(std::make_shared<Arena>()) { Front::installed(); }

void StepMemory::enter() {
  TORCH_CHECK(entered == nullptr, "this thread has entered a StepMemory already");
  entered = arena_;
}

void StepMemory::leave() { entered.reset(); }

size_t StepMemory::bytes_held() const { return arena_->reached(); }

}  // namespace gptfast::cpu
